// Products of attentions and a warehouse: kernels[row][e] = sum_j alpha[row][j] cells[j][e], and their gradients.
#pragma once

#include "streaming.h"

struct Mixture {
  Int rows, n, width;  // number of mixed cells, of cells in the warehouse, and of numbers in each
  Int threads;
};

// columns of a warehouse that are mixed at a time
constexpr Int COLUMNS = 8 * TILE;
// A sum covers as many numbers of kernels and of a warehouse as fit a second-level cache, because adding up the lanes
// of short lines costs as much as the products.
constexpr Int SUMMED_NUMBERS = (640 << 10) / Int(sizeof(real)), SUMMED_COLUMNS = 64 * TILE;

static thread_local Buffer mixing[3];

// c[row][e] = sum_k a[row][k] b[k][e] for `count` columns.  Whole vectors of b are read, but only `count` columns are
// written; p.c is not read.  spare: memory of ROWS tiles.
template <typename To>
static void columns_product(Product p, To *c, Int rows, Int count, real *spare) {
  Int spare_rows[ROWS];
  for (int r = 0; r < ROWS; r++) spare_rows[r] = r * TILE;
  const real *b = p.b;
  const Int *a_rows = p.a_rows, *c_rows = p.c_rows;
  const bool past = p.past_caches;
  const Int parts = (rows + ROWS - 1) / ROWS;
  for (Int part = 0; part < parts; part++) {
    const Int first = rows * part / parts, some = rows * (part + 1) / parts - first;
    p.a_rows = a_rows + first;
    for (Int e = 0; e < count; e += TILE) {
      const Int width = std::min<Int>(TILE, count - e);
      p.b = b + e, p.c = spare, p.c_rows = spare_rows;
      if constexpr (std::is_same<To, real>::value)
        if (width % LANES == 0) p.c = c + e, p.c_rows = c_rows + first;
      const bool spared = p.c == spare;
      p.past_caches = past && !spared;
      for (Int r = 0; r < some && spared && p.add; r++) copy(c + c_rows[first + r] + e, width, spare + r * TILE);
      product(p, some, (width + LANES - 1) / LANES);
      for (Int r = 0; r < some && spared; r++) copy(spare + r * TILE, width, c + c_rows[first + r] + e);
    }
  }
}

// up to this many rows, reading the warehouse takes longer than the products
constexpr Int FEW_ROWS = 64;

static void mix(const Mixture &m, const real *alpha, const real *cells, real *kernels) {
  const std::vector<Int> a_rows = steps(m.rows, m.n), c_rows = steps(m.rows, m.width);
  if (m.rows <= FEW_ROWS) {
    // a multiple of a vector for every thread
    const Int share = whole((m.width + m.threads - 1) / m.threads), shares = (m.width + share - 1) / share;
#pragma omp parallel for schedule(static) num_threads(m.threads)
    for (Int i = 0; i < shares; i++)
      stream({cells + i * share, m.width, alpha, a_rows.data(), m.rows, kernels + i * share, m.width}, m.n,
             std::min(share, m.width - i * share));
    return;
  }
  const Int parts = (m.width + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for schedule(static) num_threads(m.threads)
  for (Int part = 0; part < parts; part++) {
    const Int first = part * COLUMNS, count = std::min(COLUMNS, m.width - first), step = whole(count);
    real *packed = mixing[0].get(m.n * step);
    pack_rows(cells + first, m.n, m.width, count, packed, step);
    Product p = {};
    p.a = alpha, p.a_rows = a_rows.data(), p.a_step = 1;
    p.b = packed, p.b_step = step;
    p.c_rows = c_rows.data(), p.depth = m.n, p.groups = 1;
    columns_product(p, kernels + first, m.rows, count, mixing[1].get(ROWS * TILE));
  }
}

// number of partial sums of dalpha in `unmix`
static Int unmix_parts(const Mixture &m) { return std::max<Int>(1, std::min<Int>(16, m.width / COLUMNS)); }

// Gradients of `mix`, each unless null.  dalpha has room for `unmix_parts` partial sums; the first becomes the total.
static void unmix(const Mixture &m, const real *dkernels, const real *alpha, const real *cells, real *dalpha,
                  real *dcells) {
  const std::vector<Int> a_rows = steps(m.n, 1), c_rows = steps(m.n, m.width);
  const Int parts = unmix_parts(m), size = m.rows * m.n;
  const Int columns = std::max(COLUMNS, std::min(SUMMED_COLUMNS, SUMMED_NUMBERS / (m.n + m.rows) / TILE * TILE));
  const bool past = dcells && past_caches(dcells, m.n, m.width);
  if (dcells) expect_writes(dcells, m.n * m.width);
#pragma omp parallel for schedule(static) num_threads(m.threads)
  for (Int part = 0; part < parts; part++) {
    const Int vectors = whole(m.width) / LANES;
    const Int begin = vectors * part / parts * LANES, end = std::min(vectors * (part + 1) / parts * LANES, m.width);
    for (Int first = begin; first < end; first += columns) {
      const Int count = std::min(columns, end - first), step = whole(count);
      real *gradients = mixing[0].get(m.rows * step);
      pack_rows(dkernels + first, m.rows, m.width, count, gradients, step);
      if (dalpha) {
        real *packed = mixing[2].get(m.n * step);
        pack_rows(cells + first, m.n, m.width, count, packed, step);
        all_dots(gradients, step, m.rows, packed, step, m.n, dalpha + part * size, step, first > begin);
      }
      if (dcells) {
        Product p = {};
        p.a = alpha, p.a_rows = a_rows.data(), p.a_step = m.n;
        p.b = gradients, p.b_step = step;
        p.c_rows = c_rows.data(), p.depth = m.rows, p.groups = 1, p.past_caches = past;
        columns_product(p, dcells + first, m.n, count, mixing[1].get(ROWS * TILE));
      }
    }
    written();
  }
  if (dalpha)
    for (Int part = 1; part < parts; part++)
      for (Int i = 0; i < size; i++) dalpha[i] += dalpha[part * size + i];
}
