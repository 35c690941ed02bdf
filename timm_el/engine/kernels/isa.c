/* The table of instruction sets, and the one that runs. */
#include "isa.h"

#include <string.h>

/* Best first; the last one runs everywhere. Of several with one name, the first that the processor runs has it. */
static const el_isa isas[] = {
#if defined(EL_X86)
    {.name = "avx512",
     .needs = EL_CPU_VPOPCNTDQ | EL_CPU_VNNI,
     .counter = &el_counter_avx512_popcount,
     .real = &el_real_avx512,
     .int8 = &el_int8_avx512_vnni,
     .chip_rate = el_chip_rate_avx512_popcount},
    {.name = "avx512bw",
     .needs = EL_CPU_AVX512 | EL_CPU_VNNI,
     .counter = &el_counter_avx512_adders,
     .real = &el_real_avx512,
     .int8 = &el_int8_avx512_vnni,
     .chip_rate = el_chip_rate_avx512_adders},
    {.name = "avx512bw",
     .needs = EL_CPU_AVX512,
     .counter = &el_counter_avx512_adders,
     .real = &el_real_avx512,
     .int8 = &el_int8_avx2,
     .chip_rate = el_chip_rate_avx512_adders},
    {.name = "avx2",
     .needs = EL_CPU_AVX2,
     .counter = &el_counter_avx2,
     .real = &el_real_avx2,
     .int8 = &el_int8_avx2,
     .chip_rate = el_chip_rate_avx2},
#elif defined(EL_ARM)
    {.name = "neondot",
     .needs = EL_CPU_NEON | EL_CPU_DOTPROD,
     .counter = &el_counter_neon_dot,
     .real = &el_real_neon,
     .int8 = &el_int8_neon_dot,
     .chip_rate = el_chip_rate_neon},
    {.name = "neon",
     .needs = EL_CPU_NEON,
     .counter = &el_counter_neon,
     .real = &el_real_neon,
     .int8 = &el_int8_neon,
     .chip_rate = el_chip_rate_neon},
#endif
    {.name = "portable",
     .counter = &el_counter_portable,
     .real = &el_real_portable,
     .int8 = &el_int8_portable,
     .chip_rate = el_chip_rate_portable},
};
#define N_ISAS ((int)(sizeof isas / sizeof *isas))

const el_isa *el_isa_active = &isas[N_ISAS - 1];

#ifndef EL_HASH
#define EL_HASH ""
#endif

const char *el_hash(void) { return EL_HASH; }

static int is_supported(const el_isa *isa) { return (el_cpu() & isa->needs) == isa->needs; }

static char names[128];

const char *el_bodies(void) { return names; }

__attribute__((constructor)) static void find_names(void) {
    const char *last = "";
    for (int i = 0; i < N_ISAS; i++) {
        if (!is_supported(isas + i) || !strcmp(isas[i].name, last)) continue;
        if (names[0]) strcat(names, " ");
        strcat(names, last = isas[i].name);
    }
}

/* A program that never asks runs the best one. */
__attribute__((constructor)) static void use_best(void) {
    int i = 0;
    while (!is_supported(isas + i)) i++;
    el_isa_active = isas + i;
}

int el_use(const char *name) {
    for (int i = 0; i < N_ISAS; i++)
        if (!strcmp(isas[i].name, name) && is_supported(isas + i)) {
            el_isa_active = isas + i;
            return EL_OK;
        }
    return EL_BAD_PLAN;
}

const char *el_active(void) { return el_isa_active->name; }
