/* Intel AMX on processors without it: a handler of SIGILL that executes one tile instruction and goes on behind it.
 *
 * So tests run the very machine code that ships. Every thread has tiles of its own. Whatever real hardware faults on (a tile
 * without configuration, shapes that do not fit each other) ends the process with a message, as do other illegal instructions.
 * Source: Intel SDM volume 2, chapter 3 of the "Architecture Instruction Set Extensions" (LDTILECFG ... TDPBF16PS).
 *
 *   int amx_emulate(void)                  installs the handler; 0 on success
 *   void amx_counts(uint64_t counts[5])    configurations, tiles loaded, tiles stored, products, products' rows of all threads
 */
#define _GNU_SOURCE
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

enum { TILES = 8, ROWS = 16, BYTES = 64 };
enum { CONFIGURED, LOADED, STORED, MULTIPLIED, MULTIPLIED_ROWS, COUNTS };

static _Thread_local struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} config;
static _Thread_local uint8_t tile[TILES][ROWS][BYTES];
static uint64_t counts[COUNTS];

typedef struct {
  int prefix, opcode, mod, reg, rm, vvvv, x, b; /* prefix: 0 none, 1 0x66, 2 0xF3, 3 0xF2 */
  const uint8_t *next;                          /* behind ModRM */
} instruction;

static void fail(const char *why) {
  fprintf(stderr, "AMX emulator: %s\n", why);
  abort();
}

static void check(int tile_number) {
  if (!config.palette) fail("a tile instruction without a tile configuration");
  if (!config.rows[tile_number] || !config.bytes[tile_number]) fail("a tile that is not configured");
}

static int64_t general(const ucontext_t *context, int number) {
  static const int names[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[names[number]];
}

static int64_t displacement(instruction *i, int bytes) {
  int8_t small;
  int32_t large;
  if (bytes == 1) memcpy(&small, i->next, 1); else memcpy(&large, i->next, 4);
  i->next += bytes;
  return bytes == 1 ? small : large;
}

/* The address of a memory operand; *stride becomes the scaled index register, or is added where `stride` is NULL. */
static uint8_t *address(const ucontext_t *context, instruction *i, int64_t *stride) {
  int64_t at = 0, index = 0;
  if (i->rm == 4) {
    uint8_t sib = *i->next++;
    int number = (sib >> 3 & 7) | i->x << 3, base = sib & 7;
    if (number != 4) index = general(context, number) * (1 << (sib >> 6));
    if (base == 5 && i->mod == 0) at = displacement(i, 4); else at = general(context, base | i->b << 3);
  } else if (stride) {
    fail("a tile load or store without an index register");
  } else if (i->rm == 5 && i->mod == 0) {
    at = displacement(i, 4);
    at += (int64_t)(intptr_t)i->next; /* relative to the next instruction; no immediate follows */
  } else {
    at = general(context, i->rm | i->b << 3);
  }
  if (i->mod == 1) at += displacement(i, 1);
  if (i->mod == 2) at += displacement(i, 4);
  if (stride) *stride = index; else at += index;
  return (uint8_t *)(intptr_t)at;
}

static void configure(const uint8_t *from) {
  memcpy(&config, from, sizeof config);
  if (config.palette > 1 || config.start_row) fail("a tile configuration of another palette, or in mid-instruction");
  for (int t = 0; t < 16; ++t)
    if (config.rows[t] > (t < TILES ? ROWS : 0) || config.bytes[t] > (t < TILES ? BYTES : 0)) fail("a tile that is too large");
  memset(tile, 0, sizeof tile);
  __atomic_fetch_add(&counts[CONFIGURED], 1, __ATOMIC_RELAXED);
}

static void move(const ucontext_t *context, instruction *i) {
  int64_t stride;
  uint8_t *memory = address(context, i, &stride);
  int store = i->prefix == 2;
  check(i->reg);
  if (!store) memset(tile[i->reg], 0, sizeof tile[i->reg]);
  for (int row = 0; row < config.rows[i->reg]; ++row, memory += stride) {
    if (store) memcpy(memory, tile[i->reg][row], config.bytes[i->reg]);
    else memcpy(tile[i->reg][row], memory, config.bytes[i->reg]);
  }
  __atomic_fetch_add(&counts[store ? STORED : LOADED], 1, __ATOMIC_RELAXED);
}

static int32_t value(uint8_t byte, int is_signed) { return is_signed ? (int8_t)byte : byte; }

static void multiply_bytes(const instruction *i, int rows, int words, int columns) {
  int left = i->prefix >= 2, right = i->prefix == 1 || i->prefix == 3; /* SS: F2, SU: F3, US: 66, UU: none */
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      uint32_t sum;
      memcpy(&sum, &tile[i->reg][m][4 * n], 4);
      for (int k = 0; k < words; ++k)
        for (int byte = 0; byte < 4; ++byte)
          sum += (uint32_t)(value(tile[i->rm][m][4 * k + byte], left) * value(tile[i->vvvv][k][4 * n + byte], right));
      memcpy(&tile[i->reg][m][4 * n], &sum, 4);
    }
}

static float widened(const uint8_t *half) {
  uint16_t bits;
  float result;
  memcpy(&bits, half, 2);
  uint32_t wide = (bits & 0x7f80) ? (uint32_t)bits << 16 : (uint32_t)(bits & 0x8000) << 16; /* denormals are zero */
  memcpy(&result, &wide, 4);
  return result;
}

static void multiply_halves(const instruction *i, int rows, int words, int columns) {
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      float sum, even = 0, odd = 0;
      memcpy(&sum, &tile[i->reg][m][4 * n], 4);
      for (int k = 0; k < words; ++k) {
        even = fmaf(widened(&tile[i->rm][m][4 * k]), widened(&tile[i->vvvv][k][4 * n]), even);
        odd = fmaf(widened(&tile[i->rm][m][4 * k + 2]), widened(&tile[i->vvvv][k][4 * n + 2]), odd);
      }
      sum += even + odd;
      memcpy(&tile[i->reg][m][4 * n], &sum, 4);
    }
}

static void multiply(const instruction *i) {
  int out = i->reg, left = i->rm, right = i->vvvv;
  check(out), check(left), check(right);
  if (out == left || out == right || left == right) fail("a product with one tile twice");
  if (config.rows[out] != config.rows[left] || config.bytes[out] != config.bytes[right] ||
      config.bytes[left] != 4 * config.rows[right] || config.bytes[out] % 4)
    fail("a product of tiles whose shapes do not fit");
  (i->opcode == 0x5e ? multiply_bytes : multiply_halves)(i, config.rows[out], config.rows[right], config.bytes[out] / 4);
  __atomic_fetch_add(&counts[MULTIPLIED], 1, __ATOMIC_RELAXED);
  __atomic_fetch_add(&counts[MULTIPLIED_ROWS], config.rows[out], __ATOMIC_RELAXED);
}

static void control(const ucontext_t *context, instruction *i) {
  if (i->mod == 3 && i->prefix == 3) {
    check(i->reg);
    memset(tile[i->reg], 0, sizeof tile[i->reg]);
  } else if (i->mod == 3 && i->prefix == 0 && i->reg == 0 && i->rm == 0) {
    memset(&config, 0, sizeof config);
  } else if (i->mod != 3 && i->prefix == 0) {
    configure(address(context, i, NULL));
  } else if (i->mod != 3 && i->prefix == 1) {
    memcpy(address(context, i, NULL), &config, sizeof config);
  } else {
    fail("an unknown form of opcode 49");
  }
}

static void on_illegal(int signal, siginfo_t *info, void *opaque) {
  ucontext_t *context = opaque;
  const uint8_t *code = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP];
  (void)signal, (void)info;
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84)) fail("an illegal instruction that is not of AMX");
  instruction i = {.prefix = code[2] & 3, .opcode = code[3], .mod = code[4] >> 6, .reg = code[4] >> 3 & 7, .rm = code[4] & 7,
                   .vvvv = ~(code[2] >> 3) & 15, .x = !(code[1] & 0x40), .b = !(code[1] & 0x20), .next = code + 5};
  if (i.opcode == 0x49) control(context, &i);
  else if (i.opcode == 0x4b && i.prefix && i.mod != 3) move(context, &i);
  else if ((i.opcode == 0x5e || (i.opcode == 0x5c && i.prefix == 2)) && i.mod == 3 && i.vvvv < TILES) multiply(&i);
  else fail("an illegal instruction that is not of AMX");
  context->uc_mcontext.gregs[REG_RIP] = (greg_t)(intptr_t)i.next;
}

int amx_emulate(void) {
  struct sigaction action = {.sa_sigaction = on_illegal, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigemptyset(&action.sa_mask);
  return sigaction(SIGILL, &action, NULL);
}

void amx_counts(uint64_t *into) { memcpy(into, counts, sizeof counts); }
