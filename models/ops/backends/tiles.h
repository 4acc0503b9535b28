// Kernels that are mixed tile by tile, and used while they are in the cache, so that no whole kernel is in memory.
#pragma once

#include "maps.h"

// channels of x and y that lie side by side, which is also the length of a tile of kernels along the channels that a
// product sums over
constexpr Int CHUNK = 64;
// distance of two tiles; not a power of two, because lines at such distances share the sets of a cache
constexpr Int WIDTH = CHUNK * TILE + LANES;
// of the tiles that are mixed at a time; together with a tile of the warehouse they fit a second-level cache
constexpr Int CACHE_BYTES = 384 << 10;

static thread_local Buffer tiles, warehouse;

// Where the numbers of x or y lie: [image][block][chunk][position][channel of the chunk], where a block has a whole
// number of vectors of channels, and positions are those with padding.
struct Map {
  Int images, blocks, channels, positions;

  Int size() const { return whole(channels) * positions; }  // of a block
  Int step(Int channel) const { return std::min(CHUNK, whole(channels) - channel / CHUNK * CHUNK); }
  // of a channel of a block at the first position
  Int at(Int image, Int block, Int channel) const {
    const Int chunk = channel / CHUNK * CHUNK;
    return (image * blocks + block) * size() + chunk * positions + channel - chunk;
  }
  Int chunks() const { return (channels + CHUNK - 1) / CHUNK; }
};

// The shapes of mixtures.  The structures that Python fills begin with them.
struct Shape {
  Int samples, g_out, g_in, taps, n, c_out, c_in;
  Int groups;  // of the convolution: so many samples share an image of x and y
  Int threads;

  // a unit is a sample, a block of outputs and a block of inputs
  Int units() const { return samples * g_out * g_in; }
  Map x_map(Int positions) const { return {samples / groups, groups * g_in, c_in, positions}; }
  Map y_map(Int positions) const { return {samples / groups, groups * g_out, c_out, positions}; }
  // where the channels of a unit begin in a map of x, and in one of y
  Int x_at(const Map &m, Int u, Int channel) const {
    const Int s = u / (g_out * g_in);
    return m.at(s / groups, s % groups * g_in + u % g_in, channel);
  }
  Int y_at(const Map &m, Int u, Int channel) const {
    const Int s = u / (g_out * g_in);
    return m.at(s / groups, s % groups * g_out + u / g_in % g_out, channel);
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

// --- maps -------------------------------------------------------------------------------------------------------------

// calls `use` with the layout of every chunk of a map, where it is in memory as x or y, and where in the map
template <typename Use>
static void all_chunks(const Map &m, Int positions, bool last, const Int *rows, Int threads, Use use) {
  const Int channels = m.blocks * m.channels, chunks = m.chunks();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Int item = 0; item < m.images * m.blocks * chunks; item++) {
    const Int image = item / chunks / m.blocks, block = item / chunks % m.blocks, first = item % chunks * CHUNK;
    const Int count = std::min(CHUNK, m.channels - first), channel = block * m.channels + first;
    const Block part = {last ? 1 : positions, last ? channels : 1, count, positions, rows};
    use(part, image * channels * positions + channel * part.channel, m.at(image, block, first), m.step(first));
  }
}

static void arrange(const Map &m, Int positions, bool last, const Int *rows, Int threads, const stored *from, real *to) {
  all_chunks(m, positions, last, rows, threads, [&](const Block &part, Int source, Int target, Int step) {
    // zeros for the padding of positions and of channels
    if (rows || part.channels < step) std::fill_n(to + target, m.positions * step, real(0));
    to_rows(part, from + source, to + target, step);
  });
}

static void restore(const Map &m, Int positions, bool last, const Int *rows, Int threads, const real *from, stored *to) {
  all_chunks(m, positions, last, rows, threads, [&](const Block &part, Int target, Int source, Int step) {
    from_rows(part, from + source, step, to + target);
  });
}

// --- tiles ------------------------------------------------------------------------------------------------------------

// warehouse[j][k][lane] for inputs k0 <= k < k0 + depth, where lanes are outputs: the transposed cells
static void pack_outputs(const Shape &c, const real *cells, const Tile &tile, Int k0, Int depth, real *out) {
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
static void pack_inputs(const Shape &c, const real *cells, const Tile &tile, Int k0, Int depth, real *out, Int width) {
  for (Int j = 0; j < c.n; j++) {
    const real *from = cells + (j * c.c_out + k0) * c.c_in + tile.first;
    real *to = out + j * width;
    if (j + 1 < c.n) prefetch(from + c.c_out * c.c_in, depth, c.c_in, tile.width);
    pack_rows(from, depth, c.c_in, tile.width, to, tile.padded);
  }
}

// how many units have their tiles mixed at a time
static Int unit_step(const Shape &c) {
  return std::max<Int>(1, CACHE_BYTES / (c.taps * WIDTH * Int(sizeof(real))));
}

// out[row][e] = sum_j alpha[row][j] packed[j][e] for the rows of units u0 <= u < u1
static void mix(const Shape &c, const real *alpha, const real *packed, Int u0, Int u1, Int block, real *out,
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

// Mixes tiles of the kernels of all units and calls `use` with each of them at once.  A kernel has `lanes` channels
// along vectors, and `depths` channels that a product sums over.  `together` consecutive units write to the same
// output, so one thread processes them in order.
template <typename Pack, typename Use>
static void mixed_tiles(const Shape &c, const real *alpha, Int lanes, Int depths, Int together, Pack pack, Use use) {
  const Int step = unit_step(c);
  const std::vector<Int> alpha_rows = steps(step * c.taps, c.n), tile_rows = steps(step * c.taps, WIDTH);
  const Int outputs = c.units() / together, n_tiles = (lanes + TILE - 1) / TILE;
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
        mix(c, alpha, packed, u0, u1, depth * tile.padded, mixed, alpha_rows.data(), tile_rows.data());
        for (Int u = u0; u < u1; u++) use(tile, u, k0, depth, mixed + (u - u0) * c.taps * WIDTH);
      }
    }
  }
}
