// Mixture convolution on the CPU in tiles: a tile of every sample's kernel is mixed, and multiplied while it is in the
// cache, so that no whole kernel is stored in memory.  fused.py calls these functions and describes the arrays.
//
// One routine does all work, C[i, :] (+)= sum_k A[i, k] B[k, :], with rows of C held in registers, and tables that tell
// where the rows of A, B and C begin.  The order of every sum is the same for all numbers of threads.

#include "registers.h"

// length of a tile of kernels along the channels that a product sums over
constexpr Int CHUNK = 64;
// distance of two tiles; not a power of two, because lines at such distances share the sets of a cache
constexpr Int WIDTH = CHUNK * TILE + LANES;
// of the tiles that are mixed at a time; together with a tile of the warehouse they fit a second-level cache
constexpr Int CACHE_BYTES = 384 << 10;

static thread_local Buffer tiles, warehouse, gradients;

// fused.py fills the fields in this order
struct Call {
  Int samples, g_out, g_in, taps, n, c_out, c_in, positions;
  Int groups;                    // of the convolution: so many samples share an image of x and y
  Int x_image, y_image, y_step;  // distances of two images of x and of y, and of two positions of y
  Int c_out_pad, c_in_pad;       // channels of a block in y and x, padded to whole vectors
  Int threads;
  const Int *position, *tap;  // offsets in x of the window of every position, and of every tap in a window

  Int units() const { return samples * g_out * g_in; }
  // where the channels of a unit begin; a unit is a sample, a block of outputs and a block of inputs
  Int x_at(Int u) const {
    const Int s = u / (g_out * g_in);
    return s / groups * x_image + (s % groups * g_in + u % g_in) * c_in_pad;
  }
  Int y_at(Int u) const {
    const Int s = u / (g_out * g_in);
    return s / groups * y_image + (s % groups * g_out + u / g_in % g_out) * c_out_pad;
  }
};

struct Tile {
  Int first, width, padded;  // channels along vectors: the first, their number, and that padded to whole vectors
  int vectors;
  Tile(Int number, Int channels) : first(number * TILE) {
    width = std::min<Int>(TILE, channels - first);
    vectors = (width + LANES - 1) / LANES;
    padded = vectors * LANES;
  }
};

// warehouse[j][k][lane] for inputs k0 <= k < k0 + depth, where lanes are outputs: the transposed cells
static void pack_outputs(const Call &c, const real *cells, const Tile &tile, Int k0, Int depth, real *out) {
  for (Int j = 0; j < c.n; j++) {
    const real *from = cells + (j * c.c_out + tile.first) * c.c_in + k0;
    real *to = out + j * WIDTH;
    if (j + 1 < c.n) prefetch(from + c.c_out * c.c_in, tile.width, c.c_in, depth);
    const Int whole_k = depth / LANES * LANES, whole_l = tile.width / LANES * LANES;
    for (Int l = 0; l < whole_l; l += LANES)
      for (Int k = 0; k < whole_k; k += LANES)
        transpose(from + l * c.c_in + k, c.c_in, to + k * tile.padded + l, tile.padded);
    for (Int k = 0; k < depth; k++) {
      for (Int l = k < whole_k ? whole_l : 0; l < tile.width; l++) to[k * tile.padded + l] = from[l * c.c_in + k];
      for (Int l = tile.width; l < tile.padded; l++) to[k * tile.padded + l] = 0;
    }
  }
}

// warehouse[j][k][lane] for outputs k0 <= k < k0 + depth, where lanes are inputs
static void pack_inputs(const Call &c, const real *cells, const Tile &tile, Int k0, Int depth, real *out) {
  for (Int j = 0; j < c.n; j++) {
    const real *from = cells + (j * c.c_out + k0) * c.c_in + tile.first;
    real *to = out + j * WIDTH;
    if (j + 1 < c.n) prefetch(from + c.c_out * c.c_in, depth, c.c_in, tile.width);
    pack_rows(from, depth, c.c_in, tile.width, to, tile.padded);
  }
}

// how many units have their tiles mixed at a time
static Int unit_step(const Call &c) {
  return std::max<Int>(1, CACHE_BYTES / (c.taps * WIDTH * Int(sizeof(real))));
}

// out[row][e] = sum_j alpha[row][j] packed[j][e] for the rows of units u0 <= u < u1
static void mix(const Call &c, const real *alpha, const real *packed, Int u0, Int u1, Int block, real *out,
                const Int *alpha_rows, const Int *tile_rows) {
  Product p = {};
  p.a = alpha + u0 * c.taps * c.n, p.a_rows = alpha_rows, p.a_step = 1;
  p.b_step = WIDTH, p.c_rows = tile_rows;
  p.depth = c.n, p.groups = 1;
  for (Int e = 0; e < block; e += TILE) {
    p.b = packed + e, p.c = out + e;
    product(p, (u1 - u0) * c.taps, std::min<Int>(VECTORS, (block - e) / LANES));
  }
}

// tables of one call, shared by its threads
struct Rows {
  std::vector<Int> alpha, tile, y, ones, warehouse, lines[VECTORS + 1];  // lines[v]: of a tile of v vectors
  explicit Rows(const Call &c) {
    const Int rows = unit_step(c) * c.taps;
    alpha = steps(rows, c.n), tile = steps(rows, WIDTH), y = steps(c.positions, c.y_step);
    for (int v = 0; v <= VECTORS; v++) lines[v] = steps(CHUNK, v * LANES);
    ones = steps(std::max<Int>(CHUNK, c.n), 1);
    warehouse = steps(c.n, WIDTH);
  }
};

// Mixes tiles of the kernels of all units and calls `use` with each of them at once.  A kernel has `lanes` channels
// along vectors, and `depths` channels that a product sums over.  `together` consecutive units write to the same
// output, so one thread processes them in order.
template <typename Pack, typename Use>
static void mixed_tiles(const Call &c, const real *alpha, Int lanes, Int depths, Int together, Pack pack, Use use) {
  const Rows rows(c);
  const Int step = unit_step(c), outputs = c.units() / together, n_tiles = (lanes + TILE - 1) / TILE;
  // split the samples if there are too few tiles to share evenly among the threads
  const Int parts = std::min(outputs, std::max<Int>(1, (4 * c.threads + n_tiles - 1) / n_tiles));
#pragma omp parallel for schedule(dynamic, 1) num_threads(c.threads)
  for (Int item = 0; item < n_tiles * parts; item++) {
    const Tile tile(item / parts, lanes);
    const Int first = outputs * (item % parts) / parts * together;
    const Int last = outputs * (item % parts + 1) / parts * together;
    real *mixed = tiles.get(step * c.taps * WIDTH);
    real *packed = warehouse.get(c.n * WIDTH);
    for (Int k0 = 0; k0 < depths; k0 += CHUNK) {
      const Int depth = std::min(CHUNK, depths - k0);
      pack(tile, k0, depth, packed);
      for (Int u0 = first; u0 < last; u0 += step) {
        const Int u1 = std::min(last, u0 + step);
        mix(c, alpha, packed, u0, u1, depth * tile.padded, mixed, rows.alpha.data(), rows.tile.data());
        for (Int u = u0; u < u1; u++) use(rows, tile, u, k0, depth, mixed + (u - u0) * c.taps * WIDTH);
      }
    }
  }
}

extern "C" {

// y [image][position][channel] = the convolution; all of y is written
void forward(const Call *call, const real *x, const real *alpha, const real *cells, real *y) {
  const Call &c = *call;
  const auto pack = [&](const Tile &tile, Int k0, Int depth, real *out) {
    pack_outputs(c, cells, tile, k0, depth, out);
  };
  const auto use = [&](const Rows &rows, const Tile &tile, Int u, Int k0, Int depth, const real *kernels) {
    Product p = {};
    p.a = x + c.x_at(u) + k0, p.a_rows = c.position, p.a_step = 1, p.a_groups = c.tap;
    p.b = kernels, p.b_step = tile.padded, p.b_group = WIDTH;
    p.c = y + c.y_at(u) + tile.first, p.c_rows = rows.y.data();
    p.depth = depth, p.groups = c.taps, p.add = k0 > 0 || u % c.g_in > 0;
    product(p, c.positions, tile.vectors);
  };
  mixed_tiles(c, alpha, c.c_out, c.c_in, c.g_in, pack, use);
}

// adds the gradient of the input to dx, which has the layout of x
void input_gradient(const Call *call, const real *dy, const real *alpha, const real *cells, real *dx) {
  const Call &c = *call;
  const auto pack = [&](const Tile &tile, Int k0, Int depth, real *out) {
    pack_inputs(c, cells, tile, k0, depth, out);
  };
  const auto use = [&](const Rows &rows, const Tile &tile, Int u, Int k0, Int depth, const real *kernels) {
    for (Int t = 0; t < c.taps; t++) {
      Product p = {};
      p.a = dy + c.y_at(u) + k0, p.a_rows = rows.y.data(), p.a_step = 1;
      p.b = kernels + t * WIDTH, p.b_step = tile.padded;
      p.c = dx + c.x_at(u) + c.tap[t] + tile.first, p.c_rows = c.position;
      p.depth = depth, p.groups = 1, p.add = true;
      product(p, c.positions, tile.vectors);
    }
  };
  mixed_tiles(c, alpha, c.c_in, c.c_out, c.g_out * c.g_in, pack, use);
}

// number of partial sums of dalpha that kernel_gradients writes
Int parts_of_alpha(const Call *call) {
  return (call->c_in + TILE - 1) / TILE * ((call->c_out + CHUNK - 1) / CHUNK);
}

// Writes dalpha [part][unit, tap][n], which the caller sums over parts, and dcells [n][c_out][c_in], each unless null.
void kernel_gradients(const Call *call, const real *dy, const real *x, const real *alpha, const real *cells,
                      real *dalpha, real *dcells) {
  const Call &c = *call;
  const Rows rows(c);
  const Int step = unit_step(c), units = c.units();
  const Int chunks = (c.c_out + CHUNK - 1) / CHUNK, items = parts_of_alpha(call);
  if (dcells) expect_writes(dcells, c.n * c.c_out * c.c_in);
#pragma omp parallel for schedule(dynamic, 1) num_threads(c.threads)
  for (Int item = 0; item < items; item++) {
    const Tile tile(item / chunks, c.c_in);
    const Int k0 = item % chunks * CHUNK, depth = std::min(CHUNK, c.c_out - k0), block = depth * tile.padded;
    real *mixed = tiles.get(step * c.taps * WIDTH);
    real *packed = warehouse.get(c.n * WIDTH), *sums = gradients.get(c.n * WIDTH);
    if (dalpha) pack_inputs(c, cells, tile, k0, depth, packed);
    for (Int u0 = 0; u0 < units; u0 += step) {
      const Int u1 = std::min(units, u0 + step), count = (u1 - u0) * c.taps;
      for (Int u = u0; u < u1; u++)
        for (Int t = 0; t < c.taps; t++) {
          Product p = {};
          p.a = dy + c.y_at(u) + k0, p.a_rows = rows.ones.data(), p.a_step = c.y_step;
          p.b = x + c.x_at(u) + c.tap[t] + tile.first, p.b_rows = c.position;
          p.c = mixed + ((u - u0) * c.taps + t) * WIDTH, p.c_rows = rows.lines[tile.vectors].data();
          p.depth = c.positions, p.groups = 1;
          product(p, depth, tile.vectors);
        }
      if (dalpha)
        all_dots(mixed, WIDTH, count, packed, WIDTH, c.n, dalpha + (item * units + u0) * c.taps * c.n, block,
                 false);
      if (dcells) {
        Product p = {};
        p.a = alpha + u0 * c.taps * c.n, p.a_rows = rows.ones.data(), p.a_step = c.n;
        p.b_step = WIDTH, p.c_rows = rows.warehouse.data();
        p.depth = count, p.groups = 1, p.add = u0 > 0;
        for (Int e = 0; e < block; e += TILE) {
          p.b = mixed + e, p.c = sums + e;
          product(p, c.n, std::min<Int>(VECTORS, (block - e) / LANES));
        }
      }
    }
    if (dcells)
      for (Int j = 0; j < c.n; j++)
        for (Int k = 0; k < depth; k++)
          std::memcpy(dcells + (j * c.c_out + k0 + k) * c.c_in + tile.first, sums + j * WIDTH + k * tile.padded,
                      tile.width * sizeof(real));
  }
}
}
