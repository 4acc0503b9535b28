// Products of few rows of attentions and a warehouse, which is read as a stream.
#pragma once

#include "registers.h"

// cells of the warehouse that are added to all sums at a time, and vectors of each that registers hold
constexpr int STREAMS = ROWS * VECTORS >= 24 ? 4 : 2, HELD = 4;
// numbers of sums that stay in a first-level cache
constexpr Int STREAMED_NUMBERS = (16 << 10) / Int(sizeof(real));

struct Stream {
  const real *cells;
  Int cell;  // distance of two cells
  const real *alpha;
  const Int *alpha_rows;  // offset of every row
  Int rows;
  real *sums;
  Int step;  // distance of two sums
};

// sums[r][e] (+)= sum over COUNT cells of alpha[r][j] cells[j][e] for V vectors; `next` is where the next cells begin
template <int COUNT, int V>
static inline void add_cells(const Stream &s, Int j, Int e, const real *next, bool add) {
  vec held[COUNT][V];
  for (int i = 0; i < COUNT; i++) {
    const real *from = s.cells + (j + i) * s.cell + e;
    for (int v = 0; v < V; v++) held[i][v] = load(from + v * LANES);
    for (int b = 0; b < V * BYTES; b += 64) __builtin_prefetch(next + i * s.cell + b / Int(sizeof(real)), 0, 2);
  }
  for (Int r = 0; r < s.rows; r++) {
    const real *alpha = s.alpha + s.alpha_rows[r] + j;
    real *to = s.sums + r * s.step + e;
    vec sum[V];
    for (int v = 0; v < V; v++) sum[v] = add ? load(to + v * LANES) : vec{};
    for (int i = 0; i < COUNT; i++)
      for (int v = 0; v < V; v++) sum[v] += alpha[i] * held[i][v];
    for (int v = 0; v < V; v++) store(to + v * LANES, sum[v]);
  }
}

// the same for numbers first <= e < last, with `next` for e = 0
template <int COUNT>
static void add_cells_of(const Stream &s, Int j, Int first, Int last, const real *next) {
  const bool add = j > 0;
  Int e = first;
  for (; e + HELD * LANES <= last; e += HELD * LANES) add_cells<COUNT, HELD>(s, j, e, next + e, add);
  for (; e + LANES <= last; e += LANES) add_cells<COUNT, 1>(s, j, e, next + e, add);
  for (; e < last; e++)
    for (Int r = 0; r < s.rows; r++) {
      real sum = add ? s.sums[r * s.step + e] : 0;
      for (int i = 0; i < COUNT; i++) sum += s.alpha[s.alpha_rows[r] + j + i] * s.cells[(j + i) * s.cell + e];
      s.sums[r * s.step + e] = sum;
    }
}

// sums[r][e] = sum_j alpha[r][j] cells[j][e] for n cells and e < length.  Sums stay in the cache, while the cells of a
// few rows of the warehouse are read one after the other, as processors expect it.
static void stream(const Stream &s, Int n, Int length) {
  const Int wanted = STREAMED_NUMBERS / s.rows / (HELD * LANES) * (HELD * LANES);
  const Int part = std::max<Int>(HELD * LANES, std::min<Int>(wanted, 1024));
  for (Int first = 0; first < length; first += part) {
    const Int last = std::min(length, first + part);
    Int j = 0;
    for (; j + STREAMS <= n; j += STREAMS) {
      // after the last cells of this part come the first ones of the next part
      const bool more = j + 2 * STREAMS <= n;
      add_cells_of<STREAMS>(s, j, first, last, more ? s.cells + (j + STREAMS) * s.cell : s.cells + part);
    }
    for (; j < n; j++) add_cells_of<1>(s, j, first, last, s.cells + part);
  }
}
