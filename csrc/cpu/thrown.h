// What threads of a parallel region throw, thrown again after it: an exception that leaves a region ends the process.
#pragma once

#include <atomic>
#include <exception>

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

// One for each region, before it. Around what may throw, a chunk of the work at a time: thrown.keep([&] { ... }).
class Thrown {
 public:
  template <typename Body>
  void keep(Body body) {
    try {
      body();
    } catch (...) {
      if (!any_.test_and_set()) first_ = std::current_exception();
    }
  }

  // After the region, whose end has all threads done.
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::atomic_flag any_ = ATOMIC_FLAG_INIT;
  std::exception_ptr first_;
};

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
