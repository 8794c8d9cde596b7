// One fiber per CUDA thread: a stack of its own, and a fault in it that comes back as a C++ exception.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <exception>
#include <functional>
#include <new>

namespace cuda_on_cpu {

// A fiber touched memory that it must not touch.
struct Fault {
  uintptr_t address;
  bool in_stack;
};

class Fiber {
 public:
  Fiber() {
    stack_ = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack_, kGuard, PROT_NONE);
  }
  ~Fiber() { munmap(stack_, kGuard + kStack); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // `body` runs from its start at the next resume(). A body that was left half-way is forgotten.
  void start(const std::function<void()>* body) {
    body_ = body;
    done_ = false;
    getcontext(&context_);
    context_.uc_stack.ss_sp = static_cast<char*>(stack_) + kGuard;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, &Fiber::enter, 0);
  }

  // Runs the fiber until it suspends itself or ends. What it throws is thrown here; a fault as Fault.
  void resume() {
    running_ = this;
    failure_ = nullptr;
    faulted_ = false;
    swapcontext(&scheduler_, &context_);
    running_ = nullptr;
    if (faulted_) {
      const auto stack = reinterpret_cast<uintptr_t>(stack_);
      throw Fault{fault_address_, fault_address_ - stack < kGuard};
    }
    if (failure_ != nullptr) std::rethrow_exception(failure_);
  }

  void suspend() { swapcontext(&context_, &scheduler_); }
  bool done() const { return done_; }

  // While it lives, a fault inside a fiber ends up in that fiber's resume().
  class Faults {
   public:
    Faults() : stack_(64 << 10) {
      stack_t stack{};
      stack.ss_sp = stack_.data();
      stack.ss_size = stack_.size();
      sigaltstack(&stack, &old_stack_);
      struct sigaction action {};
      action.sa_sigaction = &Fiber::on_fault;
      action.sa_flags = SA_SIGINFO | SA_ONSTACK;
      sigaction(SIGSEGV, &action, &old_segv_);
      sigaction(SIGBUS, &action, &old_bus_);
    }
    ~Faults() {
      sigaction(SIGSEGV, &old_segv_, nullptr);
      sigaction(SIGBUS, &old_bus_, nullptr);
      sigaltstack(&old_stack_, nullptr);
    }
    Faults(const Faults&) = delete;
    Faults& operator=(const Faults&) = delete;

   private:
    std::vector<char> stack_;
    stack_t old_stack_{};
    struct sigaction old_segv_ {}, old_bus_ {};
  };

 private:
  static constexpr size_t kStack = 256 << 10, kGuard = 64 << 10;

  static void enter() {
    Fiber* self = running_;
    // An exception cannot leave a fiber's stack: it is carried over by hand.
    try {
      (*self->body_)();
    } catch (...) {
      self->failure_ = std::current_exception();
    }
    self->done_ = true;
    self->suspend();
  }

  static void on_fault(int number, siginfo_t* info, void*) {
    if (running_ == nullptr) {
      signal(number, SIG_DFL);  // not ours: the access is tried again and ends the process as usual
      return;
    }
    running_->faulted_ = true;
    running_->fault_address_ = reinterpret_cast<uintptr_t>(info->si_addr);
    setcontext(&scheduler_);
  }

  inline static Fiber* running_ = nullptr;
  inline static ucontext_t scheduler_{};

  void* stack_;
  ucontext_t context_{};
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr failure_;
  bool done_ = true, faulted_ = false;
  uintptr_t fault_address_ = 0;
};

}  // namespace cuda_on_cpu
