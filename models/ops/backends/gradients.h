// Gradients of alpha and of the cells from those of kernels, tile by tile.
#pragma once

#include "tiles.h"

// of the tiles of all kernels and of the warehouse, if they are in the cache together
constexpr Int GRADIENT_BYTES = 640 << 10;
// partial sums of the gradient of alpha
constexpr Int PARTS = 32;

static thread_local Buffer gradients;

// output channels whose gradients of kernels are computed at a time: few enough that the tiles of all kernels and of
// the warehouse are in the cache together
static Int gradient_depth(const Shape &c) {
  Int depth = CHUNK;
  while (depth > CHUNK / 4 && (c.units() * c.taps + c.n) * depth * TILE * Int(sizeof(real)) > GRADIENT_BYTES) depth /= 2;
  return depth;
}

static Int gradient_items(const Shape &c) {
  const Int depth = gradient_depth(c);
  return (c.c_in + TILE - 1) / TILE * ((c.c_out + depth - 1) / depth);
}

// number of partial sums of dalpha
static Int gradient_parts(const Shape &c) { return std::min(PARTS, gradient_items(c)); }

// Calls `make` for the gradient of every tile of a kernel, and sums them up at once: in dalpha [part][unit, tap][n],
// which the caller sums over parts, and dcells [n][c_out][c_in], each unless null.  `make` writes the gradients of all
// taps, which are `width` apart, for channels k0 <= k < k0 + depth of y; it gets the offsets of these channels, and of
// their lines in the gradient of a tap.
template <typename Make>
static void tile_gradients(const Shape &c, const real *alpha, const real *cells, real *dalpha, real *dcells, Make make) {
  const Int units = c.units(), longest = gradient_depth(c), width = longest * TILE + LANES;
  const Int step = std::min(units, std::max<Int>(1, GRADIENT_BYTES / (c.taps * width * Int(sizeof(real)))));
  const Int n_tiles = (c.c_in + TILE - 1) / TILE, items = gradient_items(c), parts = gradient_parts(c);
  const std::vector<Int> ones = steps(std::max(CHUNK, c.n), 1), sum_rows = steps(c.n, width);
  const std::vector<Int> cell_rows = steps(c.n, c.c_out * c.c_in);
  const bool past = dcells && past_caches(dcells, c.n * c.c_out, c.c_in);
  if (dcells) expect_writes(dcells, c.n * c.c_out * c.c_in);
#pragma omp parallel for schedule(dynamic, 1) num_threads(c.threads)
  for (Int part = 0; part < parts; part++) {
    real *mixed = tiles.get(step * c.taps * width);
    real *packed = warehouse.get(c.n * width);
    // neighbours in the warehouse are processed one after the other
    for (Int item = items * part / parts; item < items * (part + 1) / parts; item++) {
      const Tile tile(item % n_tiles, c.c_in);
      const Int k0 = item / n_tiles * longest, depth = std::min(longest, c.c_out - k0), block = depth * tile.padded;
      const std::vector<Int> lines = steps(depth, tile.padded);
      // sums over all units at once are written to the result
      const bool direct = step == units && tile.width == tile.padded;
      real *sums = direct ? nullptr : gradients.get(c.n * width);
      if (dalpha) pack_inputs(c, cells, tile, k0, depth, packed, width);
      for (Int u0 = 0; u0 < units; u0 += step) {
        const Int u1 = std::min(units, u0 + step), count = (u1 - u0) * c.taps;
        for (Int u = u0; u < u1; u++)
          make(tile, u, k0, depth, ones.data(), lines.data(), mixed + (u - u0) * c.taps * width, width);
        if (dalpha)
          all_dots(mixed, width, count, packed, width, c.n, dalpha + (part * units + u0) * c.taps * c.n, block,
                   item > items * part / parts);
        if (!dcells) continue;
        Product p = {};
        p.a = alpha + u0 * c.taps * c.n, p.a_rows = ones.data(), p.a_step = c.n;
        p.b_step = width, p.c_rows = direct ? cell_rows.data() : sum_rows.data();
        p.depth = count, p.groups = 1, p.add = u0 > 0, p.past_caches = direct && past;
        if (direct)
          for (Int j = 0; j < c.n; j += ROWS) {
            const Int some = std::min<Int>(ROWS, c.n - j);
            p.a_rows = ones.data() + j, p.c_rows = cell_rows.data() + j;
            for (Int k = 0; k < depth; k++) {
              p.b = mixed + k * tile.padded, p.c = dcells + (k0 + k) * c.c_in + tile.first;
              product(p, some, tile.vectors);
            }
          }
        else
          for (Int e = 0; e < block; e += TILE) {
            p.b = mixed + e, p.c = sums + e;
            product(p, c.n, std::min<Int>(VECTORS, (block - e) / LANES));
          }
      }
      if (dcells && !direct)
        for (Int j = 0; j < c.n; j++)
          for (Int k = 0; k < depth; k++)
            std::memcpy(dcells + (j * c.c_out + k0 + k) * c.c_in + tile.first, sums + j * width + k * tile.padded,
                        tile.width * sizeof(real));
    }
    written();
  }
}
