/* EL_TARGET(features): what follows is compiled for a processor that has them; EL_END_TARGET ends it. The file itself
 * is built for any processor, and cpu.c says at run time who may call its functions. */
#define EL_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define EL_TARGET(features) EL_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define EL_END_TARGET _Pragma("clang attribute pop")
#else
#define EL_TARGET(features) _Pragma("GCC push_options") EL_PRAGMA(GCC target(features))
#define EL_END_TARGET _Pragma("GCC pop_options")
#endif
