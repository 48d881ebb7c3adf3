/* Runs one work-group after another, every lane a fibre on its own stack, and gives the gfx942 intrinsics a meaning.
   Lanes run until they need another lane (shuffle, barrier); a wave has 64. x86-64, System V calling convention. */
#define _GNU_SOURCE
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { WAVE = 64, MAX_LANES = 1024, STACK = 1 << 18, SHARED = 1 << 16 };

char global_smem[SHARED] __attribute__((aligned(1024)));
int lanes_without_barriers; /* for the negative control */

static void *main_sp, *lane_sp[MAX_LANES];
static char *stacks;
static int lane, lanes, done[MAX_LANES];
static long progress;
static uint32_t group[3], groups[3], waiting, generation;
static uint32_t posted[2][MAX_LANES], turn[MAX_LANES];
static void (*kernel)(void *);
static void *arguments;

void lanes_switch(void **save, void *load);
__asm__(".globl lanes_switch\nlanes_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");

static void yield(void) { lanes_switch(&lane_sp[lane], main_sp); }

static void enter(void) {
    kernel(arguments);
    done[lane] = 1;
    for (;;) yield();
}

/* 0, or 1 if the lanes wait for each other for ever */
int lanes_run(void (*body)(void *), void *args, int x, int y, int z, int threads) {
    kernel = body, arguments = args, lanes = threads;
    groups[0] = x, groups[1] = y, groups[2] = z;
    if (!stacks)
        stacks = mmap(0, (size_t)MAX_LANES * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED || threads > MAX_LANES) abort();
    for (long at = 0; at < (long)x * y * z; at++) {
        group[0] = at % x, group[1] = at / x % y, group[2] = at / x / y;
        memset(global_smem, 0x7f, SHARED); /* poison: 3.4e38 */
        waiting = 0;
        for (int i = 0; i < lanes; i++) {
            void **top = (void **)(stacks + (size_t)(i + 1) * STACK - 64);
            *top = (void *)enter; /* entered as if called: the stack is 8 below a multiple of 16 */
            lane_sp[i] = top - 6;
            done[i] = turn[i] = 0;
        }
        for (int left = lanes; left;) {
            long before = progress;
            left = 0;
            for (lane = 0; lane < lanes; lane++)
                if (!done[lane]) {
                    lanes_switch(&main_sp, lane_sp[lane]);
                    if (done[lane]) progress++;
                    else left++;
                }
            if (left && progress == before) return 1;
        }
    }
    return 0;
}

/* All lanes of the wave leave a word and read the others'. Two buffers: a fast lane may already be at its next. */
static uint32_t *exchange(uint32_t value) {
    uint32_t *words = posted[turn[lane]++ & 1];
    words[lane] = value;
    progress++;
    yield();
    return words;
}

static int wave(void) { return lane & ~(WAVE - 1); }

void gcn_s_barrier(void) {
    if (lanes_without_barriers) return;
    uint32_t mine = generation;
    progress++;
    if (++waiting == (uint32_t)lanes) waiting = 0, generation++;
    while (mine == generation) yield();
}

/* Of a work-group of one wave; on the GPU its lanes are in step, here they meet. */
void gcn_wave_barrier(void) {
    if (!lanes_without_barriers) exchange(0);
}

/* Implicit kernel arguments, AMDGPU code object version 5: number of groups, their size, remainders. */
void *gcn_implicitarg_ptr(void) {
    static struct { uint32_t groups[3]; uint16_t size[3], remainder[3]; char rest[232]; } hidden;
    memcpy(hidden.groups, groups, sizeof groups);
    hidden.size[0] = lanes, hidden.size[1] = hidden.size[2] = 1;
    return &hidden;
}

uint32_t gcn_workitem_id_x(void) { return lane; }
uint32_t gcn_workgroup_id_x(void) { return group[0]; }
uint32_t gcn_workgroup_id_y(void) { return group[1]; }
uint32_t gcn_workgroup_id_z(void) { return group[2]; }
uint32_t gcn_readfirstlane_i32(uint32_t v) { return exchange(v)[wave()]; }
uint32_t gcn_readlane_i32(uint32_t v, uint32_t from) { return exchange(v)[wave() + (from & 63)]; }
uint32_t gcn_ds_bpermute(uint32_t address, uint32_t v) { return exchange(v)[wave() + (address >> 2 & 63)]; }
uint32_t gcn_mbcnt_lo(uint32_t mask, uint32_t add) {
    int l = lane & 63;
    return add + __builtin_popcount(l < 32 ? mask & ((1u << l) - 1) : mask);
}
uint32_t gcn_mbcnt_hi(uint32_t mask, uint32_t add) {
    int l = lane & 63;
    return add + (l < 32 ? 0 : __builtin_popcount(mask & ((1u << (l - 32)) - 1)));
}

uint32_t gcn_ds_swizzle(uint32_t v, uint32_t pattern) {
    int l = lane & 63, from;
    if (pattern & 0x8000)
        from = (l & ~3) | (pattern >> 2 * (l & 3) & 3);
    else
        from = (l & 32) | ((((l & 31) & pattern) | (pattern >> 5 & 31)) ^ (pattern >> 10 & 31));
    return exchange(v)[wave() + from];
}

/* Data-parallel primitives, CDNA 3 ISA, table "DPP_CTRL". */
uint32_t gcn_update_dpp_i32(uint32_t old, uint32_t v, uint32_t control, uint32_t rows, uint32_t banks, _Bool zero) {
    int l = lane & 63, in_row = l & 15, row = l & ~15, amount = control & 15, from = -1;
    uint32_t *words = exchange(v);
    if (control < 0x100) from = (l & ~3) | (control >> 2 * (l & 3) & 3);
    else if (control > 0x100 && control < 0x110) from = in_row + amount < 16 ? l + amount : -1;
    else if (control > 0x110 && control < 0x120) from = in_row >= amount ? l - amount : -1;
    else if (control > 0x120 && control < 0x130) from = row + ((in_row - amount) & 15);
    else if (control == 0x140) from = row + 15 - in_row;
    else if (control == 0x141) from = (l & ~7) + 7 - (l & 7);
    else if (control == 0x142) from = row ? row - 1 : -1;
    else if (control == 0x143) from = l >= 32 ? 31 : -1;
    else if (control >= 0x150 && control < 0x160) from = row + amount;
    else abort();
    if (!(rows >> (l >> 4) & 1) || !(banks >> (l >> 2 & 3) & 1)) return old;
    return from < 0 ? (zero ? 0 : old) : words[wave() + from];
}

static uint32_t word(float x) { uint32_t w; memcpy(&w, &x, 4); return w; }
static float number(uint32_t w) { float x; memcpy(&x, &w, 4); return x; }
float gcn_readlane_f32(float v, uint32_t from) { return number(gcn_readlane_i32(word(v), from)); }
float gcn_readfirstlane_f32(float v) { return number(gcn_readfirstlane_i32(word(v))); }
float gcn_update_dpp_f32(float old, float v, uint32_t control, uint32_t rows, uint32_t banks, _Bool zero) {
    return number(gcn_update_dpp_i32(word(old), word(v), control, rows, banks, zero));
}

/* What the x86 back end calls for fptrunc to bf16: the bits come back in the low half of a register of floats. */
float __truncsfbf2(float x) {
    uint32_t w = word(x), odd = w >> 16 & 1;
    return number(x != x ? 0x7fc0 : (w + 0x7fff + odd) >> 16);
}

float gcn_rcp_f32(float x) { return 1.0f / x; }
float gcn_rsq_f32(float x) { return 1.0f / sqrtf(x); }
float gcn_sqrt_f32(float x) { return sqrtf(x); }
float gcn_exp2_f32(float x) { return exp2f(x); }
float gcn_log_f32(float x) { return log2f(x); }
float gcn_sin_f32(float turns) { return sin(6.283185307179586 * turns); }
float gcn_cos_f32(float turns) { return cos(6.283185307179586 * turns); }
float gcn_fract_f32(float x) { return fminf(x - floorf(x), 0x1.fffffep-1f); }
float gcn_fmed3_f32(float a, float b, float c) { return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c)); }
float gcn_frexp_mant_f32(float x) { int e; return isfinite(x) ? frexpf(x, &e) : x; }
uint32_t gcn_frexp_exp_i32_f32(float x) { int e = 0; if (isfinite(x)) frexpf(x, &e); return e; }

/* Matrix products of a wave: d (size x size) += a (size x depth) b (depth x size), `each` elements of depth a lane.
   Lane l holds a[l % size, each * (l / size) + e] and b likewise; accumulator r of lane l is
   d[r / 4 * (256 / size) + l / size * 4 + r % 4, l % size]. */
void gcn_mfma(int size, int depth, const float *a, const float *b, float *d) {
    static float all_a[MAX_LANES][8], all_b[MAX_LANES][8];
    int each = depth * size / WAVE, l = lane & 63, column = l % size;
    memcpy(all_a[lane], a, each * sizeof *a), memcpy(all_b[lane], b, each * sizeof *b);
    exchange(0);
    for (int r = 0; r < size * size / WAVE; r++) {
        int row = r / 4 * (256 / size) + l / size * 4 + r % 4;
        for (int k = 0; k < depth; k++)
            d[r] += all_a[wave() + k / each * size + row][k % each] * all_b[wave() + k / each * size + column][k % each];
    }
    exchange(0);
}
