// What all compiled backends share: products of tiles, copies and transpositions in registers, and scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

typedef REAL real;
typedef int64_t Int;

// a tile of C is ROWS x VECTORS registers; x86 has 32 of 512 bits or 16 of 256, ARM has 32 of 128
#if defined(__AVX512F__)
constexpr int BYTES = 64, VECTORS = 2, ROWS = 12;
#elif defined(__AVX__)
constexpr int BYTES = 32, VECTORS = 2, ROWS = 6;
#elif defined(__aarch64__)
constexpr int BYTES = 16, VECTORS = 4, ROWS = 6;
#else
constexpr int BYTES = 16, VECTORS = 2, ROWS = 6;
#endif
constexpr int LANES = BYTES / sizeof(real), TILE = LANES * VECTORS;

typedef real vec __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));

static inline vec load(const real *p) { return *reinterpret_cast<const vec *>(p); }
static inline void store(real *p, vec v) { *reinterpret_cast<vec *>(p) = v; }

// Writes a vector that is not read soon past the caches, which would otherwise read its line from memory first.  The
// address is a multiple of the vector's size; `written` makes the numbers visible to other threads.
static inline void store_past_caches(real *p, vec v) {
#if defined(__AVX512F__) && !defined(__clang__)
  if constexpr (sizeof(real) == 4)
    __builtin_ia32_movntps512(reinterpret_cast<float *>(p), (float __attribute__((vector_size(64))))v);
  else
    __builtin_ia32_movntpd512(reinterpret_cast<double *>(p), (double __attribute__((vector_size(64))))v);
#else
  store(p, v);
#endif
}
static inline void written() {
#if defined(__AVX512F__) && !defined(__clang__)
  __builtin_ia32_sfence();
#endif
}
// more bytes than this are not read soon
constexpr Int PAST_CACHES_BYTES = 4 << 20;

// whether rows of a matrix are to be written past the caches
static bool past_caches(const real *data, Int rows, Int row) {
  return reinterpret_cast<uintptr_t>(data) % BYTES == 0 && row % LANES == 0 &&
         rows * row * Int(sizeof(real)) >= PAST_CACHES_BYTES;
}

// The numbers of inputs and outputs in memory, which some functions convert in registers: a copy in another type takes
// three times the memory traffic.
#ifdef BFLOAT16  // the upper half of a float, rounded to the nearest, ties to even
typedef uint32_t bits_vec __attribute__((vector_size(BYTES), may_alias));
typedef uint16_t half_vec __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));

struct stored {
  uint16_t bits;
  stored &operator=(real value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    bits = value == value ? (wide + 0x7fff + (wide >> 16 & 1)) >> 16 : 0x7fc0;
    return *this;
  }
  operator real() const {
    const uint32_t wide = uint32_t(bits) << 16;
    real value;
    std::memcpy(&value, &wide, sizeof(wide));
    return value;
  }
};

static inline vec load(const stored *p) {
  return (vec)(__builtin_convertvector(*reinterpret_cast<const half_vec *>(p), bits_vec) << 16);
}
static inline void store(stored *p, vec v) {
  const bits_vec wide = (bits_vec)v, number = (bits_vec)(v == v);
  const bits_vec rounded = ((wide + 0x7fff + (wide >> 16 & 1)) & number) | (0x7fc00000 & ~number);
  *reinterpret_cast<half_vec *>(p) = __builtin_convertvector(rounded >> 16, half_vec);
}
#else
typedef real stored;
#endif

extern "C" Int lanes() { return LANES; }

// the count, rounded up to whole vectors
static Int whole(Int count) { return (count + LANES - 1) / LANES * LANES; }

// offsets of rows that are `step` apart
static std::vector<Int> steps(Int count, Int step) {
  std::vector<Int> table(count);
  for (Int i = 0; i < count; i++) table[i] = i * step;
  return table;
}

// --- the product ----------------------------------------------------------------------------------------------------

struct Product {
  const real *a;
  const Int *a_rows;  // offset of every row
  Int a_step;         // distance of two k
  const real *b;
  const Int *b_rows;  // offset of every k, or null if they are b_step apart
  Int b_step;
  real *c;
  const Int *c_rows;    // offset of every row
  Int depth;            // number of k in a group
  Int groups;           // number of groups of k, over all of which the product sums
  const Int *a_groups;  // offset of every group in A, or null
  Int b_group;          // distance of two groups in B
  bool add;             // whether to add to C
  bool past_caches;     // whether to write C so
};

template <int R, int V, bool GATHER>
static void rows_product(const Product &p, Int first) {
  vec sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++)
      sum[r][v] = p.add ? load(p.c + p.c_rows[first + r] + v * LANES) : vec{};
  for (Int g = 0; g < p.groups; g++) {
    const real *a = p.a + (p.a_groups ? p.a_groups[g] : 0), *b = p.b + g * p.b_group;
    const real *rows[R];
    for (int r = 0; r < R; r++) rows[r] = a + p.a_rows[first + r];
    for (Int k = 0; k < p.depth; k++) {
      const real *line = GATHER ? b + p.b_rows[k] : b + k * p.b_step;
      vec right[V];
      for (int v = 0; v < V; v++) right[v] = load(line + v * LANES);
      for (int r = 0; r < R; r++) {
        const real left = rows[r][k * p.a_step];
        for (int v = 0; v < V; v++) sum[r][v] += left * right[v];
      }
    }
  }
  if (p.past_caches) {
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) store_past_caches(p.c + p.c_rows[first + r] + v * LANES, sum[r][v]);
    return;
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(p.c + p.c_rows[first + r] + v * LANES, sum[r][v]);
}

template <int R, bool GATHER>
static void dispatch(const Product &p, Int first, int rows, int vectors) {
  if constexpr (R > 0) {
    if (rows < R) return dispatch<R - 1, GATHER>(p, first, rows, vectors);
    if (vectors == VECTORS) return rows_product<R, VECTORS, GATHER>(p, first);
    // the last tile, if the number of channels is not a multiple of a tile
    for (int v = 0; v < vectors; v++) {
      Product part = p;
      part.b += v * LANES, part.c += v * LANES;
      rows_product<R, 1, GATHER>(part, first);
    }
  }
}

static void product(const Product &p, Int rows, int vectors) {
  const Int parts = (rows + ROWS - 1) / ROWS;
  for (Int i = 0; i < parts; i++) {
    const Int first = rows * i / parts, last = rows * (i + 1) / parts;
    p.b_rows ? dispatch<ROWS, true>(p, first, last - first, vectors)
             : dispatch<ROWS, false>(p, first, last - first, vectors);
  }
}

typedef std::conditional<sizeof(real) == 4, int32_t, int64_t>::type lane;
typedef lane lane_vec __attribute__((vector_size(BYTES), aligned(sizeof(lane)), may_alias));

#if defined(__GNUC__) && !defined(__clang__)

// adds up pairs of the first 2 * HALF vectors: lanes whose number has the bit HALF set belong to the second of a pair
template <int HALF>
static inline vec paired_totals(vec *v) {
  if constexpr (HALF == 0) {
    return v[0];
  } else {
    constexpr auto mask = [](bool own) {
      lane_vec lanes = {};
      for (int l = 0; l < LANES; l++)
        lanes[l] = (l & HALF ? LANES : 0) + (own ? l : l & HALF ? l - HALF : l + HALF);
      return lanes;
    };
    const lane_vec own = mask(true), other = mask(false);
#pragma GCC unroll 16
    for (int i = 0; i < HALF; i++)
      v[i] = __builtin_shuffle(v[i], v[i + HALF], own) + __builtin_shuffle(v[i], v[i + HALF], other);
    return paired_totals<HALF / 2>(v);
  }
}
#endif

// lane l of the result is the sum of all lanes of v[l]; v is overwritten
static inline vec totals(vec *v) {
#if defined(__GNUC__) && !defined(__clang__)
  return paired_totals<LANES / 2>(v);
#else
  vec result;
  for (int l = 0; l < LANES; l++) {
    real total = 0;
    for (int e = 0; e < LANES; e++) total += v[l][e];
    result[l] = total;
  }
  return result;
#endif
}

// c[i, j] (+)= sum_e a[i, e] b[j, e]
template <int I, int J>
static void dots(const real *a, Int a_step, const real *b, Int b_step, real *c, Int c_step, Int length, bool add) {
  vec sum[I][J] = {};
  for (Int e = 0; e < length; e += LANES) {
    vec right[J];
    for (int j = 0; j < J; j++) right[j] = load(b + j * b_step + e);
    for (int i = 0; i < I; i++) {
      const vec left = load(a + i * a_step + e);
      for (int j = 0; j < J; j++) sum[i][j] += left * right[j];
    }
  }
  constexpr int VECTORS_OF_TOTALS = (I * J + LANES - 1) / LANES;
  vec all[VECTORS_OF_TOTALS * LANES] = {};
  for (int i = 0; i < I; i++)
    for (int j = 0; j < J; j++) all[i * J + j] = sum[i][j];
  real found[VECTORS_OF_TOTALS * LANES];
  for (int t = 0; t < VECTORS_OF_TOTALS; t++) store(found + t * LANES, totals(all + t * LANES));
  for (int i = 0; i < I; i++)
    for (int j = 0; j < J; j++) {
      const real total = found[i * J + j];
      c[i * c_step + j] = add ? c[i * c_step + j] + total : total;
    }
}

template <int I, int J>
static void dots_of(int columns, const real *a, Int a_step, const real *b, Int b_step, real *c, Int c_step,
                    Int length, bool add) {
  if constexpr (J > 1)
    if (columns < J) return dots_of<I, J - 1>(columns, a, a_step, b, b_step, c, c_step, length, add);
  dots<I, J>(a, a_step, b, b_step, c, c_step, length, add);
}

static void all_dots(const real *a, Int a_step, Int rows, const real *b, Int b_step, Int columns, real *c, Int length,
                     bool add) {
  constexpr int I = ROWS * VECTORS >= 24 ? 4 : 2, J = ROWS * VECTORS >= 24 ? 6 : 4;
  const Int parts = (columns + J - 1) / J;
  for (Int p = 0; p < parts; p++) {
    const Int j = columns * p / parts, count = columns * (p + 1) / parts - j;
    Int i = 0;
    for (; i + I <= rows; i += I)
      dots_of<I, J>(count, a + i * a_step, a_step, b + j * b_step, b_step, c + i * columns + j, columns, length, add);
    for (; i < rows; i++)
      dots_of<1, J>(count, a + i * a_step, a_step, b + j * b_step, b_step, c + i * columns + j, columns, length, add);
  }
}

// --- copies ----------------------------------------------------------------------------------------------------------

// Rows of a tile lie far apart in memory, so processors do not prefetch the next one by themselves.
template <typename From>
static void prefetch(const From *from, Int rows, Int step, Int length) {
  for (Int r = 0; r < rows; r++)
    for (Int e = 0; e < length; e += 64 / Int(sizeof(From))) __builtin_prefetch(from + r * step + e, 0, 2);
}

// copies `count` numbers of every row of a matrix, padded with 0 to the length `to_step`
template <typename From>
static void pack_rows(const From *from, Int rows, Int step, Int count, real *to, Int to_step) {
  for (Int r = 0; r < rows; r++, from += step, to += to_step) {
    if (r + 1 < rows) prefetch(from + step, 1, 0, count);
    Int e = 0;
    for (; e + LANES <= count; e += LANES) store(to + e, load(from + e));
    for (; e < to_step; e++) to[e] = e < count ? real(from[e]) : 0;
  }
}

// copies `count` numbers, which may change their type
template <typename From, typename To>
static inline void copy(const From *from, Int count, To *to) {
  if constexpr (std::is_same<From, To>::value) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    Int e = 0;
    for (; e + LANES <= count; e += LANES) store(to + e, load(from + e));
    for (; e < count; e++) to[e] = real(from[e]);
  }
}

// the vector with all but the first `count` lanes set to 0
static inline vec first_lanes(vec v, Int count) {
  static const struct Ones {
    lane values[2 * LANES];
    Ones() {
      for (int l = 0; l < 2 * LANES; l++) values[l] = l < LANES ? -1 : 0;
    }
  } ones;
  return (vec)((lane_vec)v & *reinterpret_cast<const lane_vec *>(ones.values + LANES - count));
}

#if defined(__GNUC__) && !defined(__clang__)

// exchanges the off-diagonal quarters of all blocks of size 2 * HALF, then of smaller blocks
template <int HALF>
static inline void exchange(vec *rows) {
  if constexpr (HALF > 0) {
    constexpr auto mask = [](bool second) {
      lane_vec lanes = {};
      for (int l = 0; l < LANES; l++)
        lanes[l] = second ? (l & HALF ? LANES + l : l + HALF) : (l & HALF ? LANES + l - HALF : l);
      return lanes;
    };
    const lane_vec upper = mask(false), lower = mask(true);
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++)
      if (!(l & HALF)) {
        const vec a = rows[l], b = rows[l + HALF];
        rows[l] = __builtin_shuffle(a, b, upper), rows[l + HALF] = __builtin_shuffle(a, b, lower);
      }
    exchange<HALF / 2>(rows);
  }
}
#endif

// to[k][l] = from[l][k] for LANES x LANES numbers
template <typename From, typename To>
static inline void transpose(const From *from, Int from_step, To *to, Int to_step) {
#if defined(__GNUC__) && !defined(__clang__)
  vec rows[LANES];
#pragma GCC unroll 16
  for (int l = 0; l < LANES; l++) rows[l] = load(from + l * from_step);
  exchange<LANES / 2>(rows);
#pragma GCC unroll 16
  for (int l = 0; l < LANES; l++) store(to + l * to_step, rows[l]);
#else
  for (int l = 0; l < LANES; l++)
    for (int k = 0; k < LANES; k++) to[k * to_step + l] = real(from[l * from_step + k]);
#endif
}

// to[column][row] = from[row][column]
template <typename From, typename To>
static void transpose_all(const From *from, Int from_step, Int rows, Int columns, To *to, Int to_step) {
  if (rows < LANES || columns < LANES) {
    for (Int i = 0; i < rows; i++)
      for (Int j = 0; j < columns; j++) to[j * to_step + i] = real(from[i * from_step + j]);
    return;
  }
  // the last block of a row or column overlaps the one before it, if it would reach beyond the end
  for (Int i = 0; i < rows; i += LANES)
    for (Int j = 0; j < columns; j += LANES) {
      const Int r = std::min<Int>(i, rows - LANES), c = std::min<Int>(j, columns - LANES);
      transpose(from + r * from_step + c, from_step, to + c * to_step + r, to_step);
    }
}

// --- memory ----------------------------------------------------------------------------------------------------------

// Asks for large pages under memory that is about to be written for the first time, which saves most page faults.
static void expect_writes(real *data, Int count) {
#ifdef __linux__
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t last = reinterpret_cast<uintptr_t>(data + count) / PAGE * PAGE;
  if (first < last) madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Memory that lives as long as its thread, so that the operating system clears its pages only once.
struct Buffer {
  real *data = nullptr;
  Int size = 0;
  ~Buffer() { std::free(data); }
  real *get(Int wanted) {
    if (wanted > size) {
      std::free(data);
      size = (wanted + LANES - 1) / LANES * LANES;
      data = static_cast<real *>(std::aligned_alloc(64, (size * sizeof(real) + 63) / 64 * 64));
      if (!data) std::abort();
    }
#ifdef POISON  // in tests: NaN reveals numbers that are read before they are written
    std::fill(data, data + wanted, std::numeric_limits<real>::quiet_NaN());
#endif
    return data;
  }
};
