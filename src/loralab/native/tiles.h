/* The processor's matrix registers (AMX): eight tiles of 16 rows of 64 bytes.
 *
 * `dot` is c += a b for 16 x 16 numbers in float: a is 16 rows of 32 bfloat16, b 16 rows of 16 pairs
 * of neighbours in the summed axis. LORALAB_TILE_MODEL stands plain C in for the instructions, so that
 * a machine without them can test what is built on them.
 */
#ifndef LORALAB_TILES_H
#define LORALAB_TILES_H
#include "dots.h"
#include <unistd.h>

#if defined(__AVX512BF16__) && \
    ((defined(__AMX_BF16__) && defined(__linux__)) || defined(LORALAB_TILE_MODEL))
#define TILES

#ifdef LORALAB_TILE_MODEL

static _Thread_local char tile_of[8][1024] __attribute__((aligned(64)));

#define tile_zero(t) memset(tile_of[t], 0, 1024)
#define tile_load(t, from, stride) \
    for (int row_ = 0; row_ < 16; row_++) \
        memcpy(tile_of[t] + row_ * 64, (const char *)(from) + row_ * (stride), 64)
#define tile_store(t, to, stride) \
    for (int row_ = 0; row_ < 16; row_++) \
        memcpy((char *)(to) + row_ * (stride), tile_of[t] + row_ * 64, 64)
#define tile_dot(c, a, b) model_dot((float *)tile_of[c], (bf16 *)tile_of[a], (bf16 *)tile_of[b])

static void model_dot(float *c, const bf16 *a, const bf16 *b) {
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 32; k++)
            for (int j = 0; j < 16; j++)
                c[i * 16 + j] += up(a[i * 32 + k]) * up(b[k / 2 * 32 + 2 * j + k % 2]);
}

#define written()
static inline int tiles_allowed(void) { return 1; }
typedef int tile_shapes;
static inline void open_tiles(tile_shapes *before) { (void)before; }
static inline void close_tiles(const tile_shapes *before) { (void)before; }

#else
#include <sys/syscall.h>

#define tile_zero _tile_zero
#define tile_load _tile_loadd
#define tile_store _tile_stored
#define tile_dot _tile_dpbf16ps
#define REQUEST_STATE 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18

typedef struct {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) tile_shapes;

/* Whether the kernel lets this process use the tiles. */
static inline int tiles_allowed(void) {
    return syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA) == 0;
}

/* Compilers do not know that tiles are loaded from memory: what was written is there from here on. */
#define written() __asm__ volatile("" ::: "memory")

/* All tiles in full size; what another library had set is kept for close_tiles. */
static inline void open_tiles(tile_shapes *before) {
    tile_shapes own = {.palette = 1};
    for (int t = 0; t < 8; t++) own.bytes[t] = 64, own.rows[t] = 16;
    _tile_storeconfig(before);
    written();
    _tile_loadconfig(&own);
}

static inline void close_tiles(const tile_shapes *before) {
    written();
    _tile_loadconfig(before);
}

#endif

/* c (+)= a b over some pairs, for m rows and n columns, multiples of 32 as 2 x pairs is; a's pairs lie
 * one after the other, and the arguments are those of dots.h's product. */
static inline void tile_multiply(long m, long n, long pairs, const uint32_t *a, long a_row,
                                 const uint32_t *b, long b_pair, long b_vector, float *c,
                                 long c_row, int add) {
    written();
    for (long i = 0; i < m; i += 32)
        for (long j = 0; j < n; j += 32) {
            float *to = c + i * c_row + j;
            if (add) {
                tile_load(0, to, c_row * 4);
                tile_load(1, to + 16, c_row * 4);
                tile_load(2, to + 16 * c_row, c_row * 4);
                tile_load(3, to + 16 * c_row + 16, c_row * 4);
            } else {
                tile_zero(0);
                tile_zero(1);
                tile_zero(2);
                tile_zero(3);
            }
            for (long p = 0; p < pairs; p += 16) {
                const uint32_t *from = b + p * b_pair + j / 16 * b_vector;
                tile_load(4, a + i * a_row + p, a_row * 4);
                tile_load(5, a + (i + 16) * a_row + p, a_row * 4);
                tile_load(6, from, b_pair * 4);
                tile_load(7, from + b_vector, b_pair * 4);
                tile_dot(0, 4, 6);
                tile_dot(1, 4, 7);
                tile_dot(2, 5, 6);
                tile_dot(3, 5, 7);
            }
            tile_store(0, to, c_row * 4);
            tile_store(1, to + 16, c_row * 4);
            tile_store(2, to + 16 * c_row, c_row * 4);
            tile_store(3, to + 16 * c_row + 16, c_row * 4);
        }
}

#else
static inline int tiles_allowed(void) { return 0; }
#endif
#endif
