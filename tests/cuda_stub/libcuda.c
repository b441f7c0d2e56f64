// CUDA's driver without a GPU: what Triton and our own launch call of it. It loads cubins as the driver does, so far as
// to know what parameters each kernel takes, and instead of running a kernel it writes down its launch.
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Status;
typedef void* Handle;
enum { OK = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, MAX_PARAMETERS = 64, LOG_BYTES = 1 << 20 };

typedef struct {
  char name[128];
  int number;  // of the kernel among all that were loaded
  int n_parameters;
  size_t offsets[MAX_PARAMETERS], sizes[MAX_PARAMETERS];
} Kernel;

static int device = 0, n_devices = 1, n_kernels = 0, writes_log = 1;  // device -1: the thread has no context
static Status next_status = OK;
static long n_launches = 0, log_end = 0;
static char log_text[LOG_BYTES];

// For the tests, by ctypes.
long stub_launches(void) { return n_launches; }
void stub_write_log(int on) { writes_log = on; }
void stub_fail_next(Status status) { next_status = status; }
void stub_set_device(int current, int count) { device = current, n_devices = count; }
int stub_device(void) { return device; }
const char* stub_take_log(void) {
  log_text[log_end] = 0;
  log_end = 0;
  return log_text;
}

// The parameters as the cubin's .nv.info section has them (EIATTR_KPARAM_INFO); what `cuobjdump -elf` prints.
static void read_parameters(Kernel* kernel, const char* image) {
  const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + header->e_shoff);
  const char* names = image + sections[header->e_shstrndx].sh_offset;
  char wanted[160];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", kernel->name);
  for (int s = 0; s < header->e_shnum; ++s) {
    if (strcmp(names + sections[s].sh_name, wanted)) continue;
    const uint8_t* at = (const uint8_t*)image + sections[s].sh_offset;
    const uint8_t* end = at + sections[s].sh_size;
    while (at + 4 <= end) {
      const int sized = at[0] == 4, size = sized ? at[2] | at[3] << 8 : 0;
      if (sized && at[1] == 0x17) {
        uint16_t ordinal, offset;
        uint32_t flags;
        memcpy(&ordinal, at + 8, 2), memcpy(&offset, at + 10, 2), memcpy(&flags, at + 12, 4);
        kernel->offsets[ordinal] = offset, kernel->sizes[ordinal] = flags >> 18 & 0x3fff;
        if (ordinal + 1 > kernel->n_parameters) kernel->n_parameters = ordinal + 1;
      }
      at += 4 + size;
    }
  }
}

Status cuModuleLoadData(Handle* module, const void* image) { return *module = (Handle)image, OK; }
Status cuModuleGetFunction(Handle* function, Handle module, const char* name) {
  Kernel* kernel = calloc(1, sizeof(Kernel));
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  kernel->number = n_kernels++;
  read_parameters(kernel, module);
  return *function = kernel, OK;
}
Status cuFuncGetParamInfo(Handle function, size_t i, size_t* offset, size_t* size) {
  const Kernel* kernel = function;
  if (i >= (size_t)kernel->n_parameters) return INVALID_VALUE;
  return *offset = kernel->offsets[i], *size = kernel->sizes[i], OK;
}

typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  Handle stream, attributes;
  unsigned n_attributes;
} Config;
Status cuLaunchKernelEx(const Config* c, Handle function, void** parameters, void** extra) {
  const Kernel* kernel = function;
  const Status status = next_status;
  next_status = OK;
  if (device < 0) return INVALID_CONTEXT;
  if (status) return status;
  ++n_launches;
  if (!writes_log || log_end + 2048 > LOG_BYTES) return OK;
#define WRITE(...) log_end += snprintf(log_text + log_end, LOG_BYTES - log_end, __VA_ARGS__)
  WRITE("%s %d grid %u %u %u block %u %u %u shared %u stream %p device %d attributes %u extra %p parameters",
        kernel->name, kernel->number, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2],
        c->shared_bytes, c->stream, device, c->n_attributes, (void*)extra);
  for (int i = 0; i < kernel->n_parameters; ++i) {
    WRITE(" ");
    for (size_t b = 0; b < kernel->sizes[i]; ++b) WRITE("%02x", ((const uint8_t*)parameters[i])[b]);
  }
  WRITE("\n");
  return OK;
}

Status cuDriverGetVersion(int* version) { return *version = 13000, OK; }
Status cuInit(unsigned flags) { return OK; }
Status cuDeviceGet(int* d, int i) { return *d = i, OK; }
Status cuDeviceGetCount(int* n) { return *n = n_devices, OK; }
Status cuDeviceGetAttribute(int* value, int attribute, int d) {  // an H100's, where Triton asks
  switch (attribute) {
    case 8:
      return *value = 49152, OK;  // shared memory a block
    case 97:
      return *value = 232448, OK;  // the same where a kernel asks for more
    case 81:
      return *value = 233472, OK;  // a multiprocessor's
    case 16:
      return *value = 132, OK;  // multiprocessors
    case 82:
    case 12:
      return *value = 65536, OK;  // registers
    case 10:
      return *value = 32, OK;  // a warp's threads
    default:
      return *value = 1024, OK;
  }
}
Status cuCtxGetCurrent(Handle* context) { return *context = (Handle)(intptr_t)(device + 1), OK; }
Status cuCtxSetCurrent(Handle context) { return device = (int)(intptr_t)context - 1, OK; }
Status cuCtxGetDevice(int* d) { return device < 0 ? INVALID_CONTEXT : (*d = device, OK); }
Status cuDevicePrimaryCtxRetain(Handle* context, int d) { return *context = (Handle)(intptr_t)(d + 1), OK; }
Status cuDevicePrimaryCtxRelease_v2(int d) { return OK; }
static int below = -1;
Status cuCtxPushCurrent_v2(Handle context) { return below = device, cuCtxSetCurrent(context); }
Status cuCtxPopCurrent_v2(Handle* context) { return cuCtxGetCurrent(context), device = below, OK; }
Status cuCtxGetLimit(size_t* value, int limit) { return *value = 1 << 20, OK; }
Status cuCtxSetLimit(int limit, size_t value) { return OK; }
Status cuFuncGetAttribute(int* value, int attribute, Handle f) { return *value = attribute == 0 ? 1024 : 0, OK; }
Status cuFuncSetAttribute(Handle f, int attribute, int value) { return OK; }
Status cuFuncSetCacheConfig(Handle f, int config) { return OK; }
Status cuModuleUnload(Handle module) { return OK; }
Status cuStreamIsCapturing(Handle stream, int* is) { return *is = 0, OK; }
Status cuGetErrorString(Status status, const char** text) { return *text = "an error of the stub", OK; }
Status cuPointerGetAttribute(void* data, int attribute, uint64_t p) { return *(uint64_t*)data = p, OK; }
Status cuOccupancyMaxActiveClusters(int* n, Handle f, Handle config) { return *n = 1, OK; }
Status cuTensorMapEncodeTiled(Handle map) { return OK; }
Status cuTensorMapEncodeIm2col(Handle map) { return OK; }
