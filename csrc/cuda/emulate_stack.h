// emulate_stack.h - stacks of fibers for emulate.cpp, and going from one to another.
//
// swapcontext of the C library asks the system for the signal mask at every switch, which takes a hundred
// times as long as the rest.
#ifndef MKVQ_EMULATE_STACK_H
#define MKVQ_EMULATE_STACK_H
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

// Leaves the registers that a function must keep on the stack and the stack's address in *from; goes on
// with the stack `to`, which was left likewise.
extern "C" void mkvq_switch_stack(void **from, void *to);

#if defined(__x86_64__)
asm(R"(
    .text
    .p2align 4
    .type mkvq_switch_stack, @function
mkvq_switch_stack:
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
    .size mkvq_switch_stack, . - mkvq_switch_stack
)");
enum { SAVED_WORDS = 8, START_WORD = 6 }; // words of a new stack, and which is the first function
#elif defined(__aarch64__)
asm(R"(
    .text
    .p2align 4
    .type mkvq_switch_stack, %function
mkvq_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size mkvq_switch_stack, . - mkvq_switch_stack
)");
enum { SAVED_WORDS = 20, START_WORD = 11 };
#else
#error "the emulator does not know how to switch stacks on this machine"
#endif

namespace emulate
{
// Memory for n stacks of `bytes`, each above a page that, if `guarded`, cannot be touched.
inline uint8_t *take_stacks(int n, size_t bytes, bool guarded)
{
    const size_t page = 4096, all = (size_t)n * (bytes + page);
    void *p = mmap(nullptr, all, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        std::abort();
    for (int i = 0; guarded && i < n; i++)
        mprotect(static_cast<uint8_t *>(p) + (size_t)i * (bytes + page), page, PROT_NONE);
    return static_cast<uint8_t *>(p);
}

// Where stack i begins: not all at the same place of a page, which would share few lines of the cache.
inline void *stack_of(uint8_t *stacks, int i, size_t bytes)
{
    return stacks + (size_t)(i + 1) * (bytes + 4096) - (size_t)(i % 32) * 320;
}

inline void give_stacks(uint8_t *stacks, int n, size_t bytes)
{
    munmap(stacks, (size_t)n * (bytes + 4096));
}

// A stack on which mkvq_switch_stack goes to `start`; `end` is the address behind its memory.
inline void *new_stack(void *end, void (*start)())
{
    void **words = static_cast<void **>(end) - SAVED_WORDS;
    for (int i = 0; i < SAVED_WORDS; i++)
        words[i] = nullptr;
    words[START_WORD] = reinterpret_cast<void *>(start);
    return words;
}
} // namespace emulate
#endif
