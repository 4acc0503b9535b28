// Products of few rows of attentions and a warehouse, which is read as a stream.
#pragma once

#include "registers.h"

// cells of the warehouse that are added to all sums at a time, and vectors of each that registers hold
constexpr int STREAMS = ROWS * VECTORS >= 24 ? 4 : 2, HELD = 4;
// numbers of sums that stay in a first-level cache, and of a cell that are read in a row
constexpr Int SUMS = (16 << 10) / Int(sizeof(real)), LONGEST = 1024;

static thread_local Buffer partial;

struct Stream {
  const real *cells;
  Int cell;  // distance of two cells
  const real *alpha;
  const Int *alpha_rows;  // offset of every row
  Int rows;
  real *sums;
  Int step;  // distance of two sums
};

// Sums of a part of all rows.  They are kept together until they are complete: in the result their rows may be a power
// of two apart, and would share the sets of a cache.
struct Part {
  const Stream &s;
  Int first, count;  // which numbers of a cell
  real *sums;        // [row][count]
};

// adds `COUNT` cells times alpha to V vectors of all sums, and writes them to the result after the last cells; `next` is
// where the next cells begin
template <int COUNT, int V>
static inline void add_cells(const Part &p, Int j, Int e, const real *next, bool add, bool last) {
  const Stream &s = p.s;
  vec held[COUNT][V];
  for (int i = 0; i < COUNT; i++) {
    const real *from = s.cells + (j + i) * s.cell + p.first + e;
    for (int v = 0; v < V; v++) held[i][v] = load(from + v * LANES);
    for (int b = 0; b < V * BYTES; b += 64) __builtin_prefetch(next + i * s.cell + e + b / Int(sizeof(real)), 0, 2);
  }
  for (Int r = 0; r < s.rows; r++) {
    const real *alpha = s.alpha + s.alpha_rows[r] + j;
    const real *from = p.sums + r * p.count + e;
    real *to = last ? s.sums + r * s.step + p.first + e : p.sums + r * p.count + e;
    vec sum[V];
    for (int v = 0; v < V; v++) sum[v] = add ? load(from + v * LANES) : vec{};
    for (int i = 0; i < COUNT; i++)
      for (int v = 0; v < V; v++) sum[v] += alpha[i] * held[i][v];
    for (int v = 0; v < V; v++) store(to + v * LANES, sum[v]);
  }
}

// the same for all numbers of a part
template <int COUNT>
static void add_cells_of(const Part &p, Int j, const real *next, bool last) {
  const Stream &s = p.s;
  const bool add = j > 0;
  Int e = 0;
  for (; e + HELD * LANES <= p.count; e += HELD * LANES) add_cells<COUNT, HELD>(p, j, e, next, add, last);
  for (; e + LANES <= p.count; e += LANES) add_cells<COUNT, 1>(p, j, e, next, add, last);
  for (; e < p.count; e++)
    for (Int r = 0; r < s.rows; r++) {
      real sum = add ? p.sums[r * p.count + e] : 0;
      for (int i = 0; i < COUNT; i++)
        sum += s.alpha[s.alpha_rows[r] + j + i] * s.cells[(j + i) * s.cell + p.first + e];
      (last ? s.sums[r * s.step + p.first + e] : p.sums[r * p.count + e]) = sum;
    }
}

// sums[r][e] = sum_j alpha[r][j] cells[j][e] for n cells and e < length.  Sums stay in the cache, while a few cells at a
// time are read one after the other, as processors expect it.
static void stream(const Stream &s, Int n, Int length) {
  const Int whole_parts = SUMS / s.rows / (HELD * LANES) * (HELD * LANES);
  const Int longest = std::max<Int>(HELD * LANES, std::min(whole_parts, LONGEST));
  real *sums = partial.get(s.rows * longest);
  for (Int first = 0; first < length; first += longest) {
    const Part p = {s, first, std::min(longest, length - first), sums};
    const real *next = s.cells + first;
    Int j = 0;
    for (; j < n % STREAMS; j++) add_cells_of<1>(p, j, next + (j + 1) * s.cell, j + 1 == n);
    // after the last cells of this part come the first ones of the next part
    for (; j < n; j += STREAMS) {
      const bool last = j + STREAMS == n;
      add_cells_of<STREAMS>(p, j, last ? next + longest : next + (j + STREAMS) * s.cell, last);
    }
  }
}
