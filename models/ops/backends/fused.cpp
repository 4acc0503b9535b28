// Mixture convolution on the CPU in tiles: a tile of every sample's kernel is mixed, and multiplied while it is in the
// cache, so that no whole kernel is stored in memory.  fused.py calls these functions and describes the arrays.
//
// One routine does all work, C[i, :] (+)= sum_k A[i, k] B[k, :], with rows of C held in registers, and tables that tell
// where the rows of A, B and C begin.  The order of every sum is the same for all numbers of threads.

#include "maps.h"

// channels of x and y that lie side by side, which is also the length of a tile of kernels along the channels that a
// product sums over
constexpr Int CHUNK = 64;
// distance of two tiles; not a power of two, because lines at such distances share the sets of a cache
constexpr Int WIDTH = CHUNK * TILE + LANES;
// of the tiles that are mixed at a time; together with a tile of the warehouse they fit a second-level cache
constexpr Int CACHE_BYTES = 384 << 10;
// of the tiles of all kernels and of the warehouse, if they are in the cache together
constexpr Int GRADIENT_BYTES = 640 << 10;
// partial sums of the gradient of alpha
constexpr Int PARTS = 32;

static thread_local Buffer tiles, warehouse, gradients;

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

// fused.py fills the fields in this order
struct Call {
  Int samples, g_out, g_in, taps, n, c_out, c_in, positions;
  Int groups;                   // of the convolution: so many samples share an image of x and y
  Int inputs, rows;             // positions of x, and of x with its padding
  Int x_last, y_last, threads;  // whether channels of x and of y are innermost in memory
  // the first position of the window of every output in x with its padding, the taps in a window, and the positions of
  // x, which are null without padding
  const Int *position, *tap, *seen;

  Int units() const { return samples * g_out * g_in; }
  Map x_map() const { return {samples / groups, groups * g_in, c_in, rows}; }
  Map y_map() const { return {samples / groups, groups * g_out, c_out, positions}; }
  // where the channels of a unit begin; a unit is a sample, a block of outputs and a block of inputs
  Int x_at(Int u, Int channel) const {
    const Int s = u / (g_out * g_in);
    return x_map().at(s / groups, s % groups * g_in + u % g_in, channel);
  }
  Int y_at(Int u, Int channel) const {
    const Int s = u / (g_out * g_in);
    return y_map().at(s / groups, s % groups * g_out + u / g_in % g_out, channel);
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
static void pack_inputs(const Call &c, const real *cells, const Tile &tile, Int k0, Int depth, real *out, Int width) {
  for (Int j = 0; j < c.n; j++) {
    const real *from = cells + (j * c.c_out + k0) * c.c_in + tile.first;
    real *to = out + j * width;
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

// Offsets of the rows of a map, for the channels of its whole chunks and for those of the last one.
struct MapRows {
  std::vector<Int> full, last;
  MapRows(const Map &m, const Int *rows, Int count) : full(count), last(count) {
    for (Int i = 0; i < count; i++) {
      const Int row = rows ? rows[i] : i;
      full[i] = row * CHUNK, last[i] = row * m.step(m.channels - 1);
    }
  }
  const Int *of(Int step) const { return step == CHUNK ? full.data() : last.data(); }
};

// tables of one call, shared by its threads
struct Rows {
  std::vector<Int> alpha, tile;
  MapRows window, tap, y;  // the positions of x of every output, the taps, and the positions of y
  explicit Rows(const Call &c)
      : window(c.x_map(), c.position, c.positions), tap(c.x_map(), c.tap, c.taps), y(c.y_map(), nullptr, c.positions) {
    const Int rows = unit_step(c) * c.taps;
    alpha = steps(rows, c.n), tile = steps(rows, WIDTH);
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

// output channels whose gradients of kernels are computed at a time: few enough that the tiles of all kernels and of
// the warehouse are in the cache together
static Int gradient_depth(const Call &c) {
  Int depth = CHUNK;
  while (depth > CHUNK / 4 && (c.units() * c.taps + c.n) * depth * TILE * Int(sizeof(real)) > GRADIENT_BYTES) depth /= 2;
  return depth;
}

static Int gradient_items(const Call &c) {
  const Int depth = gradient_depth(c);
  return (c.c_in + TILE - 1) / TILE * ((c.c_out + depth - 1) / depth);
}

extern "C" {

// Writes y; `x_rows` and `y_rows` are scratch memory for x and y as maps.
void forward(const Call *call, const stored *x, const real *alpha, const real *cells, real *x_rows, real *y_rows,
             stored *y) {
  const Call &c = *call;
  const Map x_map = c.x_map(), y_map = c.y_map();
  arrange(x_map, c.inputs, c.x_last, c.seen, c.threads, x, x_rows);
  const auto pack = [&](const Tile &tile, Int k0, Int depth, real *out) {
    pack_outputs(c, cells, tile, k0, depth, out);
  };
  const auto use = [&](const Rows &rows, const Tile &tile, Int u, Int k0, Int depth, const real *kernels) {
    const Int x_step = x_map.step(k0);
    Product p = {};
    p.a = x_rows + c.x_at(u, k0), p.a_rows = rows.window.of(x_step), p.a_step = 1, p.a_groups = rows.tap.of(x_step);
    p.b = kernels, p.b_step = tile.padded, p.b_group = WIDTH;
    p.c = y_rows + c.y_at(u, tile.first), p.c_rows = rows.y.of(y_map.step(tile.first));
    p.depth = depth, p.groups = c.taps, p.add = k0 > 0 || u % c.g_in > 0;
    product(p, c.positions, tile.vectors);
  };
  mixed_tiles(c, alpha, c.c_out, c.c_in, c.g_in, pack, use);
  restore(y_map, c.positions, c.y_last, nullptr, c.threads, y_rows, y);
}

// Writes dy as a map to `y_rows`, for the two functions below.
void gradient_rows(const Call *call, const stored *dy, real *y_rows) {
  const Call &c = *call;
  arrange(c.y_map(), c.positions, c.y_last, nullptr, c.threads, dy, y_rows);
}

// Writes dx; `x_rows` is scratch memory for it as a map.
void input_gradient(const Call *call, const real *y_rows, const real *alpha, const real *cells, real *x_rows,
                    stored *dx) {
  const Call &c = *call;
  const Map x_map = c.x_map(), y_map = c.y_map();
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (Int block = 0; block < x_map.images * x_map.blocks; block++)
    std::fill_n(x_rows + block * x_map.size(), x_map.size(), real(0));
  const auto pack = [&](const Tile &tile, Int k0, Int depth, real *out) {
    pack_inputs(c, cells, tile, k0, depth, out, WIDTH);
  };
  const auto use = [&](const Rows &rows, const Tile &tile, Int u, Int k0, Int depth, const real *kernels) {
    const Int x_step = x_map.step(tile.first);
    for (Int t = 0; t < c.taps; t++) {
      Product p = {};
      p.a = y_rows + c.y_at(u, k0), p.a_rows = rows.y.of(y_map.step(k0)), p.a_step = 1;
      p.b = kernels + t * WIDTH, p.b_step = tile.padded;
      p.c = x_rows + c.x_at(u, tile.first) + rows.tap.of(x_step)[t], p.c_rows = rows.window.of(x_step);
      p.depth = depth, p.groups = 1, p.add = true;
      product(p, c.positions, tile.vectors);
    }
  };
  mixed_tiles(c, alpha, c.c_in, c.c_out, c.g_out * c.g_in, pack, use);
  restore(x_map, c.inputs, c.x_last, c.seen, c.threads, x_rows, dx);
}

// number of partial sums of dalpha that kernel_gradients writes
Int parts_of_alpha(const Call *call) { return std::min(PARTS, gradient_items(*call)); }

// Writes dalpha [part][unit, tap][n], which the caller sums over parts, and dcells [n][c_out][c_in], each unless null;
// `x_rows` is scratch memory for x as a map.
void kernel_gradients(const Call *call, const real *y_rows, const stored *x, const real *alpha, const real *cells,
                      real *x_rows, real *dalpha, real *dcells) {
  const Call &c = *call;
  const Map x_map = c.x_map(), y_map = c.y_map();
  arrange(x_map, c.inputs, c.x_last, c.seen, c.threads, x, x_rows);
  const Rows rows(c);
  const Int units = c.units(), longest = gradient_depth(c), width = longest * TILE + LANES;
  const Int step = std::min(units, std::max<Int>(1, GRADIENT_BYTES / (c.taps * width * Int(sizeof(real)))));
  const Int n_tiles = (c.c_in + TILE - 1) / TILE, items = gradient_items(c), parts = parts_of_alpha(call);
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
      const Int x_step = x_map.step(tile.first), y_step = y_map.step(k0);
      const std::vector<Int> lines = steps(depth, tile.padded);
      // sums over all units at once are written to the result
      const bool direct = step == units && tile.width == tile.padded;
      real *sums = direct ? nullptr : gradients.get(c.n * width);
      if (dalpha) pack_inputs(c, cells, tile, k0, depth, packed, width);
      for (Int u0 = 0; u0 < units; u0 += step) {
        const Int u1 = std::min(units, u0 + step), count = (u1 - u0) * c.taps;
        for (Int u = u0; u < u1; u++)
          for (Int t = 0; t < c.taps; t++) {
            Product p = {};
            p.a = y_rows + c.y_at(u, k0), p.a_rows = ones.data(), p.a_step = y_step;
            p.b = x_rows + c.x_at(u, tile.first) + rows.tap.of(x_step)[t], p.b_rows = rows.window.of(x_step);
            p.c = mixed + ((u - u0) * c.taps + t) * width, p.c_rows = lines.data();
            p.depth = c.positions, p.groups = 1;
            product(p, depth, tile.vectors);
          }
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
}
