/* Features of the processor, asked of the processor itself: __builtin_cpu_supports needs a run-time library of the
 * compiler's, which not every build of a shared library has. */
#include "engine.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* Registers that the operating system saves: bits of XCR0. */
#define YMM 0x06u
#define ZMM 0xe6u

/* Return XCR0. */
static uint32_t saved_registers(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
#if defined(__APPLE__)
    if ((low & YMM) == YMM) low |= ZMM; /* macOS saves them from their first use on */
#endif
    return low;
}

uint32_t el_cpu(void) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const uint32_t needed = bit_OSXSAVE | bit_AVX | bit_FMA | bit_POPCNT;
    if ((c & needed) != needed || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    const uint32_t saved = saved_registers();
    if ((saved & YMM) != YMM || !(b & bit_AVX2)) return 0;
    const uint32_t wide = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
    if ((saved & ZMM) != ZMM || (b & wide) != wide) return EL_CPU_AVX2;
    return EL_CPU_AVX2 | EL_CPU_AVX512 | (c & bit_AVX512VPOPCNTDQ ? EL_CPU_VPOPCNTDQ : 0) |
           (c & bit_AVX512VNNI ? EL_CPU_VNNI : 0);
}

#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#define DOT_PRODUCT (1ul << 20) /* of AT_HWCAP */
#endif

uint32_t el_cpu(void) {
#if defined(__linux__)
    return EL_CPU_NEON | (getauxval(AT_HWCAP) & DOT_PRODUCT ? EL_CPU_DOTPROD : 0);
#elif defined(__APPLE__)
    return EL_CPU_NEON | EL_CPU_DOTPROD; /* every such Mac has it */
#else
    return EL_CPU_NEON;
#endif
}

#else
uint32_t el_cpu(void) { return 0; }
#endif
