// A kernel's launch in one call: what a layout fixes is kept, and the addresses of its tensors are all that comes in.
// libcuda is looked up at run time, so that a build without CUDA has this, too. kernels/_launch.py says
// what may be launched so.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

namespace py = pybind11;

namespace mvdream_fast {
namespace {

// The part of CUDA's driver interface that a launch takes; its types have been the same since CUDA 11.8.
using Handle = void*;
struct LaunchConfig {
  unsigned grid[3], block[3], shared_bytes;
  Handle stream;
  void* attributes;
  unsigned n_attributes;
};
struct Driver {
  int (*cuLaunchKernelEx)(const LaunchConfig*, Handle, void**, void**);
  int (*cuFuncGetParamInfo)(Handle, size_t, size_t*, size_t*);
  int (*cuCtxGetDevice)(int*);
  int (*cuDevicePrimaryCtxRetain)(Handle*, int);
  int (*cuDevicePrimaryCtxRelease)(int);
  int (*cuCtxPushCurrent)(Handle);
  int (*cuCtxPopCurrent)(Handle*);
  int (*cuGetErrorString)(int, const char**);
};

// Null where there is no driver, or one older than CUDA 12.4, which cannot say what parameters a kernel takes.
const Driver* driver() {
  static Driver found;
  static const bool ok = [] {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);
    const auto find = [&](auto& function, const char* name) {
      function = library ? reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name)) : nullptr;
      return function != nullptr;
    };
    return find(found.cuLaunchKernelEx, "cuLaunchKernelEx") && find(found.cuFuncGetParamInfo, "cuFuncGetParamInfo") &&
           find(found.cuCtxGetDevice, "cuCtxGetDevice") &&
           find(found.cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain") &&
           find(found.cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2") &&
           find(found.cuCtxPushCurrent, "cuCtxPushCurrent_v2") && find(found.cuCtxPopCurrent, "cuCtxPopCurrent_v2") &&
           find(found.cuGetErrorString, "cuGetErrorString");
  }();
  return ok ? &found : nullptr;
}

constexpr int kMaxParameters = 64;
constexpr char kRecord[] = "mvdream_fast.launch";

// One kernel in one layout. Its parameters are `n_pointers` addresses, then `values`.
struct Record {
  Handle function;
  unsigned programs, threads, shared_bytes;
  int device, n_pointers, n_parameters;
  uint64_t aligned;                 // bit i: address i is a multiple of 16, as the code was compiled for
  uint64_t values[kMaxParameters];  // each in its first bytes
  py::object name, stream_of, device_index, hooks;
};

Record* record_of(PyObject* capsule) { return static_cast<Record*>(PyCapsule_GetPointer(capsule, kRecord)); }

// Whether the driver knows the kernel with these parameters, of so many bytes each, and no others.
bool takes(const Driver& cuda, Handle function, const std::string& sizes) {
  size_t offset, size;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (cuda.cuFuncGetParamInfo(function, i, &offset, &size) != 0 || size != size_t(sizes[i])) return false;
  }
  return cuda.cuFuncGetParamInfo(function, sizes.size(), &offset, &size) != 0;
}

// A launch to be kept, or None where it must stay Triton's. kinds: one letter a parameter, p (address), i, l (32 and 64
// bits) or f (float32), values: a number for each that is no address, hooks: what has Triton's launch hooks.
py::object launch_record(py::str name, uintptr_t function, unsigned programs, unsigned threads, unsigned shared_bytes,
                         py::int_ device, uint64_t aligned, const std::string& kinds, const py::tuple& values,
                         py::object stream_of, py::object hooks) {
  const Driver* cuda = driver();
  const int n_pointers = int(kinds.size() - values.size());
  if (!cuda || kinds.size() > kMaxParameters) return py::none();
  auto record = std::make_unique<Record>();
  std::string sizes;
  for (size_t i = 0; i < kinds.size(); ++i) {
    sizes += char(kinds[i] == 'p' || kinds[i] == 'l' ? 8 : 4);
    if (int(i) < n_pointers) continue;
    const py::handle value = values[i - n_pointers];
    if (kinds[i] == 'f') {
      const float number = value.cast<float>();
      std::memcpy(&record->values[i - n_pointers], &number, sizeof number);
    } else {
      record->values[i - n_pointers] = uint64_t(value.cast<int64_t>());
    }
  }
  const auto handle = reinterpret_cast<Handle>(function);
  if (!takes(*cuda, handle, sizes)) return py::none();
  record->function = handle;
  record->programs = programs, record->threads = threads, record->shared_bytes = shared_bytes;
  record->device = device.cast<int>(), record->n_pointers = n_pointers, record->n_parameters = int(kinds.size());
  record->aligned = aligned;
  record->name = name, record->stream_of = stream_of, record->device_index = device, record->hooks = hooks;
  return py::capsule(record.release(), kRecord, [](PyObject* capsule) { delete record_of(capsule); });
}

// Whether somebody asked Triton to be told of launches: a chain of hooks that is not empty, or in old versions a hook.
// -1 with Python's error set where it cannot be asked.
int is_hooked(PyObject* hooks) {
  static PyObject* names[] = {PyUnicode_InternFromString("launch_enter_hook"),
                              PyUnicode_InternFromString("launch_exit_hook")};
  static PyObject* calls_name = PyUnicode_InternFromString("calls");
  for (PyObject* name : names) {
    PyObject* chain = PyObject_GetAttr(hooks, name);
    if (!chain) return -1;
    int hooked = chain != Py_None;
    if (hooked) {
      PyObject* calls = PyObject_GetAttr(chain, calls_name);
      if (!calls) PyErr_Clear();
      if (calls) hooked = PyObject_IsTrue(calls);
      Py_XDECREF(calls);
    }
    Py_DECREF(chain);
    if (hooked) return hooked;
  }
  return 0;
}

bool address_of(PyObject* tensor, uint64_t* address) {
  static PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* number = PyObject_CallMethodNoArgs(tensor, data_ptr);
  if (!number) return false;
  *address = PyLong_AsUnsignedLongLong(number);
  Py_DECREF(number);
  return !PyErr_Occurred();
}

// On the record's device, made current where another is; a thread that has not used CUDA yet has none.
int submit(const Driver& cuda, const Record& record, Handle stream, void** parameters) {
  int current;
  const bool away = cuda.cuCtxGetDevice(&current) != 0 || current != record.device;
  Handle context;
  if (away) {
    if (const int status = cuda.cuDevicePrimaryCtxRetain(&context, record.device)) return status;
    cuda.cuCtxPushCurrent(context);
  }
  const LaunchConfig config = {
      {record.programs, 1, 1}, {record.threads, 1, 1}, record.shared_bytes, stream, nullptr, 0};
  const int status = cuda.cuLaunchKernelEx(&config, record.function, parameters, nullptr);
  if (away) {
    cuda.cuCtxPopCurrent(&context);
    cuda.cuDevicePrimaryCtxRelease(record.device);
  }
  return status;
}

// launch(record, *tensors) -> whether it was launched; otherwise (a tensor aligned in another way, somebody hooked in)
// the launch is Triton's.
PyObject* launch(PyObject*, PyObject* const* arguments, Py_ssize_t n_arguments) {
  const Record* record = n_arguments ? record_of(arguments[0]) : nullptr;
  if (!record || n_arguments - 1 != record->n_pointers) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "launch takes a record and a tensor for each address");
    return nullptr;
  }
  uint64_t addresses[kMaxParameters], aligned = 0;
  void* parameters[kMaxParameters];
  for (int i = 0; i < record->n_pointers; ++i) {
    if (i && arguments[i + 1] == arguments[i]) {
      addresses[i] = addresses[i - 1];
    } else if (!address_of(arguments[i + 1], &addresses[i])) {
      return nullptr;
    }
    aligned |= uint64_t(addresses[i] % 16 == 0) << i;
    parameters[i] = &addresses[i];
  }
  const int hooked = is_hooked(record->hooks.ptr());
  if (hooked < 0) return nullptr;
  if (hooked || aligned != record->aligned) Py_RETURN_FALSE;
  for (int i = record->n_pointers; i < record->n_parameters; ++i) {
    parameters[i] = const_cast<uint64_t*>(&record->values[i - record->n_pointers]);
  }
  PyObject* number = PyObject_CallOneArg(record->stream_of.ptr(), record->device_index.ptr());
  if (!number) return nullptr;
  const auto stream = reinterpret_cast<Handle>(PyLong_AsUnsignedLongLong(number));
  Py_DECREF(number);
  if (PyErr_Occurred()) return nullptr;
  PyThreadState* thread = PyEval_SaveThread();  // the driver waits where its queue is full
  const int status = submit(*driver(), *record, stream, parameters);
  PyEval_RestoreThread(thread);
  if (status == 0) Py_RETURN_TRUE;
  const char* text = nullptr;
  driver()->cuGetErrorString(status, &text);
  return PyErr_Format(PyExc_RuntimeError, "%U: the launch of the kernel failed with CUDA error %d: %s",
                      record->name.ptr(), status, text ? text : "unknown");
}

PyMethodDef methods[] = {{"launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(launch)), METH_FASTCALL,
                          "launch(record, *tensors) -> bool: a kept launch on the current stream"},
                         {}};

}  // namespace

void bind_launch(py::module_& m) {
  m.def("launch_record", &launch_record, "A launch to be kept, or None where it must stay Triton's");
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace mvdream_fast
