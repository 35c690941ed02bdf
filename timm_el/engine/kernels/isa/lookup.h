/* Tables of differing bits, for instruction sets that look up 16 bytes in a register but cannot count bits. */
#include <stdint.h>

/* el_differing_bits[0][b][i] is the number of bits in which i, 0 to 15, differs from the low four bits of the byte b;
 * el_differing_bits[1][b][i] is the same for the high four bits. Filled when the library is loaded. */
extern uint8_t el_differing_bits[2][256][16];
