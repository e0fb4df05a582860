// SPDX-License-Identifier: Apache-2.0
// Fibers for x86-64: a switch saves the registers that a function must keep, and the stack pointer.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <new>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

namespace emulation {
namespace {

constexpr size_t kStack = 256 * 1024;  // touched as far as it is used

struct Fiber {
  Thread thread;
  unsigned char* stack = nullptr;
  void* pointer = nullptr;
  bool running = false;
  const Barrier* barrier = nullptr;  // that it waits at, since it was passed so often:
  uint64_t passed = 0;
};

std::vector<Fiber> fibers;
Fiber* current = nullptr;
void* scheduler = nullptr;
const std::function<void()>* body = nullptr;

// Tells AddressSanitizer which stack comes next; `left` is what the one that is left keeps, null if it never returns.
struct StackChange {
  void* kept = nullptr;
  void begin([[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size,
             [[maybe_unused]] bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &kept, bottom, size);
#endif
  }
  void end([[maybe_unused]] const void** bottom = nullptr, [[maybe_unused]] size_t* size = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(kept, bottom, size);
#endif
  }
};

const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;

// It never returns, so what a sanitizer marks on its stack would stay marked for the next fiber.
__attribute__((no_sanitize_address)) void enter() {
  StackChange change;
  change.end(&scheduler_stack, &scheduler_stack_size);
  (*body)();
  finish_copies(0);
  current->running = false;
  change.begin(scheduler_stack, scheduler_stack_size, true);
  emulation_switch(&current->pointer, scheduler);
  std::abort();
}

void leave() {
  StackChange change;
  change.begin(scheduler_stack, scheduler_stack_size);
  emulation_switch(&current->pointer, scheduler);
  change.end(&scheduler_stack, &scheduler_stack_size);
}

void resume(Fiber& fiber) {
  current = &fiber;
  block->thread = &fiber.thread;
  StackChange change;
  change.begin(fiber.stack, kStack);
  emulation_switch(&scheduler, fiber.pointer);
  change.end();
}

void start(Fiber& fiber) {
  if (!fiber.stack) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    fiber.stack = static_cast<unsigned char*>(memory);
  }
  // Six registers and the address that `ret` takes; a function expects its stack 8 bytes past a multiple of 16.
  void** top = reinterpret_cast<void**>(fiber.stack + kStack) - 8;
  std::memset(top, 0, 8 * sizeof *top);
  top[6] = reinterpret_cast<void*>(&enter);
  fiber.pointer = top;
  fiber.running = true;
  fiber.barrier = nullptr;
}

bool waits(const Fiber& fiber) { return fiber.barrier && fiber.barrier->passed == fiber.passed; }

[[noreturn]] void stuck(int waiting) {
  std::fprintf(stderr, "block (%u, %u): %d threads wait at a barrier that the others never reach\n", block->index.x,
               block->index.y, waiting);
  std::abort();
}

void run_block(unsigned count) {
  for (int left = static_cast<int>(count), ran = 1; left > 0;) {
    if (ran == 0) stuck(left);
    ran = 0;
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = fibers[last_to_first ? count - 1 - i : i];
      if (!fiber.running || waits(fiber)) continue;
      resume(fiber);
      ++ran;
      if (!fiber.running) --left;
    }
  }
}

}  // namespace

void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.passed;
    return;
  }
  current->barrier = &barrier;
  current->passed = barrier.passed;
  leave();
}

void pause() {
  current->barrier = nullptr;
  leave();
}

void finish_copies(size_t groups_left) {
  auto& copies = block->thread->copies;
  while (copies.size() > groups_left + 1) {  // the open group is none
    for (const Copy& copy : copies.front()) {
      if (copy.from) std::memcpy(copy.to, copy.from, copy.bytes);
      if (!copy.from) std::memset(copy.to, 0, copy.bytes);
    }
    copies.erase(copies.begin());
  }
}

void run(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
  const unsigned count = threads.x * threads.y * threads.z;
  if (fibers.size() < count) fibers.resize(count);
  body = &kernel;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t number = last_to_first ? blocks - 1 - i : i;
    Block here;
    here.index = dim3(static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                      static_cast<unsigned>(number / grid.x / grid.y));
    here.barrier.size = static_cast<int>(count);
    void* shared = nullptr;
    if (posix_memalign(&shared, 128, shared_bytes) != 0) throw std::bad_alloc();
    std::memset(shared, 0xCD, shared_bytes);
    here.shared = static_cast<unsigned char*>(shared);
    std::vector<Warp> warps(count / 32);
    for (unsigned t = 0; t < count; ++t) {
      Thread& thread = fibers[t].thread;
      thread.copies.resize(1);
      thread.copies[0].clear();
      thread.exchange = 0;
      thread.index = dim3(t % threads.x, t / threads.x % threads.y, t / threads.x / threads.y);
      thread.lane = static_cast<int>(t % 32);
      thread.warp = &warps[t / 32];
      thread.warp->barrier.size = 32;
      start(fibers[t]);
    }
    block = &here;
    run_block(count);
    block = nullptr;
    std::free(shared);
  }
}

}  // namespace emulation
