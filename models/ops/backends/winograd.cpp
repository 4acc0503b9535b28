// Mixture convolution of 3 x 3 kernels with stride 1 on the CPU, by Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin
// and Gray, 2016): 4 x 4 inputs and 3 x 3 taps are transformed to 16 spectra, which are multiplied one by one and
// transformed to 2 x 2 outputs, with 16 products for the 36 of the definition.  A tile of every sample's kernel is mixed,
// transformed and multiplied while it is in the cache.  winograd.py calls `convolve` and describes the arrays.

#include "gradients.h"

constexpr Int TAPS = 9, SPECTRA = 16;
// squares of 2 x 2 outputs that are multiplied at a time: their spectra fit a second-level cache beside a tile of kernels
constexpr Int SQUARES = 64;
// distances of two spectra; not powers of two, because lines at such distances share the sets of a cache
constexpr Int DEEP = SQUARES * CHUNK + LANES, WIDE = SQUARES * TILE + LANES;

static thread_local Buffer kernel_spectra, deep_spectra, wide_spectra;

// winograd.py fills the fields in this order
struct Call : Shape {
  Int transposed;                 // whether outputs are convolved to inputs
  Int squares;                    // of 2 x 2 positions of the result
  Int inputs, rows, width;        // positions of the source, those with its padding, and the length of a line of these
  Int outputs, to_rows, to_width; // the same of the result
  Int last, to_last;              // whether channels are innermost in memory
  // where the window of every square begins in the source with its padding, and the positions of the source; where every
  // square begins in the result with its padding, and the positions of the result
  const Int *corner, *seen, *to_corner, *kept;
};

static inline void forward_line(vec &a, vec &b, vec &c, vec &d) {
  const vec first = a - c, second = b + c, third = c - b, fourth = b - d;
  a = first, b = second, c = third, d = fourth;
}

// spectra of a window of 4 x 4 positions, which are `step` apart, for a vector of channels
static inline void window_spectra(const real *from, Int position, Int line, real *to, Int step) {
  vec w[4][4];
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) w[i][j] = load(from + i * line + j * position);
  for (int i = 0; i < 4; i++) forward_line(w[i][0], w[i][1], w[i][2], w[i][3]);
  for (int j = 0; j < 4; j++) forward_line(w[0][j], w[1][j], w[2][j], w[3][j]);
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) store(to + (i * 4 + j) * step, w[i][j]);
}

static inline void kernel_line(vec a, vec b, vec c, vec *to) {
  const vec outer = real(0.5) * (a + c), inner = real(0.5) * b;
  to[0] = a, to[1] = outer + inner, to[2] = outer - inner, to[3] = c;
}

// spectra of the taps of a tile of kernels, which are `step` apart: from the last one for kernels turned by 180 degrees
static void tile_spectra(const real *from, Int step, Int count, real *to) {
  for (Int e = 0; e < count; e += LANES) {
    vec lines[3][4];
    for (int i = 0; i < 3; i++) {
      const real *line = from + 3 * i * step + e;
      kernel_line(load(line), load(line + step), load(line + 2 * step), lines[i]);
    }
    for (int j = 0; j < 4; j++) {
      vec spectra[4];
      kernel_line(lines[0][j], lines[1][j], lines[2][j], spectra);
      for (int i = 0; i < 4; i++) store(to + (i * 4 + j) * WIDTH + e, spectra[i]);
    }
  }
}

// a square of 2 x 2 positions of the result, for a vector of channels
static inline void square(const real *from, real *to, Int position, Int line, bool add) {
  vec w[2][4];
  for (int j = 0; j < 4; j++) {
    const vec a = load(from + j * WIDE), b = load(from + (4 + j) * WIDE), c = load(from + (8 + j) * WIDE);
    const vec d = load(from + (12 + j) * WIDE);
    w[0][j] = a + b + c, w[1][j] = b - c - d;
  }
  for (int i = 0; i < 2; i++) {
    real *left = to + i * line, *right = left + position;
    const vec first = w[i][0] + w[i][1] + w[i][2], second = w[i][1] - w[i][2] - w[i][3];
    store(left, add ? load(left) + first : first);
    store(right, add ? load(right) + second : second);
  }
}

// gradients of the spectra from that of a square, for a vector of channels
static inline void square_gradients(const real *from, Int position, Int line, real *to) {
  vec w[2][4];
  for (int i = 0; i < 2; i++) {
    const vec left = load(from + i * line), right = load(from + i * line + position);
    w[i][0] = left, w[i][1] = left + right, w[i][2] = left - right, w[i][3] = -right;
  }
  for (int j = 0; j < 4; j++) {
    const vec a = w[0][j], b = w[1][j];
    store(to + j * DEEP, a), store(to + (4 + j) * DEEP, a + b);
    store(to + (8 + j) * DEEP, a - b), store(to + (12 + j) * DEEP, -b);
  }
}

static inline void gradient_line(vec a, vec b, vec c, vec d, vec *to) {
  const vec sum = real(0.5) * (b + c);
  to[0] = a + sum, to[1] = real(0.5) * (b - c), to[2] = sum + d;
}

// gradients of the taps of a tile of kernels, which are `step` apart, from those of its spectra
static void tap_gradients(const real *from, Int count, real *to, Int step) {
  for (Int e = 0; e < count; e += LANES) {
    vec lines[4][3];
    for (int i = 0; i < 4; i++) {
      const real *line = from + 4 * i * WIDTH + e;
      gradient_line(load(line), load(line + WIDTH), load(line + 2 * WIDTH), load(line + 3 * WIDTH), lines[i]);
    }
    for (int j = 0; j < 3; j++) {
      vec taps[3];
      gradient_line(lines[0][j], lines[1][j], lines[2][j], lines[3][j], taps);
      for (int i = 0; i < 3; i++) store(to + (3 * i + j) * step + e, taps[i]);
    }
  }
}

extern "C" {

// Writes the result of a convolution; `from_map` and `to_map` are scratch memory for the source and for it as maps.
void convolve(const Call *call, const stored *source, const real *alpha, const real *cells, real *from_map, real *to_map,
              stored *result) {
  const Call &c = *call;
  const Map from = c.transposed ? c.y_map(c.rows) : c.x_map(c.rows);
  const Map to = c.transposed ? c.x_map(c.to_rows) : c.y_map(c.to_rows);
  arrange(from, c.inputs, c.last, c.seen, c.threads, source, from_map);
  const std::vector<Int> from_rows = steps(SQUARES, CHUNK), to_rows = steps(SQUARES, TILE);
  const Int blocks = (c.squares + SQUARES - 1) / SQUARES;
  const auto pack = [&](const Tile &tile, Int k0, Int depth, real *out) {
    c.transposed ? pack_inputs(c, cells, tile, k0, depth, out, WIDTH) : pack_outputs(c, cells, tile, k0, depth, out);
  };
  const auto use = [&](const Tile &tile, Int u, Int k0, Int depth, const real *kernels) {
    const Int step = from.step(k0), to_step = to.step(tile.first), summed = c.transposed ? u / c.g_in % c.g_out : u % c.g_in;
    const real *inputs = from_map + (c.transposed ? c.y_at(from, u, k0) : c.x_at(from, u, k0));
    real *outputs = to_map + (c.transposed ? c.x_at(to, u, tile.first) : c.y_at(to, u, tile.first));
    real *filters = kernel_spectra.get(SPECTRA * WIDTH);
    if (c.transposed)
      tile_spectra(kernels + (TAPS - 1) * WIDTH, -WIDTH, depth * tile.padded, filters);
    else
      tile_spectra(kernels, WIDTH, depth * tile.padded, filters);
    real *windows = deep_spectra.get(SPECTRA * DEEP), *sums = wide_spectra.get(SPECTRA * WIDE);
    for (Int block = 0; block < blocks; block++) {
      const Int first = c.squares * block / blocks, count = c.squares * (block + 1) / blocks - first;
      for (Int i = 0; i < count; i++)
        for (Int k = 0; k < depth; k += LANES)
          window_spectra(inputs + c.corner[first + i] * step + k, step, c.width * step, windows + from_rows[i] + k, DEEP);
      for (Int f = 0; f < SPECTRA; f++) {
        Product p = {};
        p.a = windows + f * DEEP, p.a_rows = from_rows.data(), p.a_step = 1;
        p.b = filters + f * WIDTH, p.b_step = tile.padded;
        p.c = sums + f * WIDE, p.c_rows = to_rows.data();
        p.depth = depth, p.groups = 1;
        product(p, count, tile.vectors);
      }
      for (Int i = 0; i < count; i++)
        for (int v = 0; v < tile.vectors; v++)
          square(sums + to_rows[i] + v * LANES, outputs + c.to_corner[first + i] * to_step + v * LANES, to_step,
                 c.to_width * to_step, k0 > 0 || summed > 0);
    }
  };
  // all units that write to a part of the result are processed in order
  if (c.transposed)
    mixed_tiles(c, alpha, c.c_in, c.c_out, c.g_out * c.g_in, pack, use);
  else
    mixed_tiles(c, alpha, c.c_out, c.c_in, c.g_in, pack, use);
  restore(to, c.outputs, c.to_last, c.kept, c.threads, to_map, result);
}

// number of partial sums of dalpha that kernel_gradients writes
Int parts_of_alpha(const Call *call) { return gradient_parts(*call); }

// Writes dalpha [part][unit, tap][n], which the caller sums over parts, and dcells [n][c_out][c_in], each unless null,
// from x and dy, which are the source and the result of `convolve`; the maps are scratch memory for both.
void kernel_gradients(const Call *call, const stored *x, const stored *dy, const real *alpha, const real *cells,
                      real *x_rows, real *y_rows, real *dalpha, real *dcells) {
  const Call &c = *call;
  const Map x_map = c.x_map(c.rows), y_map = c.y_map(c.to_rows);
  arrange(x_map, c.inputs, c.last, c.seen, c.threads, x, x_rows);
  arrange(y_map, c.outputs, c.to_last, c.kept, c.threads, dy, y_rows);
  const Int blocks = (c.squares + SQUARES - 1) / SQUARES;
  const auto make = [&](const Tile &tile, Int u, Int k0, Int depth, const Int *channels, const Int *lines,
                        real *gradient, Int width) {
    const Int x_step = x_map.step(tile.first), y_step = y_map.step(k0);
    const real *inputs = x_rows + c.x_at(x_map, u, tile.first), *outputs = y_rows + c.y_at(y_map, u, k0);
    real *filters = kernel_spectra.get(SPECTRA * WIDTH);
    real *windows = wide_spectra.get(SPECTRA * WIDE), *squares = deep_spectra.get(SPECTRA * DEEP);
    for (Int block = 0; block < blocks; block++) {
      const Int first = c.squares * block / blocks, count = c.squares * (block + 1) / blocks - first;
      for (Int i = 0; i < count; i++) {
        for (int v = 0; v < tile.vectors; v++)
          window_spectra(inputs + c.corner[first + i] * x_step + v * LANES, x_step, c.width * x_step,
                         windows + i * TILE + v * LANES, WIDE);
        for (Int k = 0; k < depth; k += LANES)
          square_gradients(outputs + c.to_corner[first + i] * y_step + k, y_step, c.to_width * y_step,
                           squares + i * CHUNK + k);
      }
      for (Int f = 0; f < SPECTRA; f++) {
        Product p = {};
        p.a = squares + f * DEEP, p.a_rows = channels, p.a_step = CHUNK;
        p.b = windows + f * WIDE, p.b_step = TILE;
        p.c = filters + f * WIDTH, p.c_rows = lines;
        p.depth = count, p.groups = 1, p.add = block > 0;
        product(p, depth, tile.vectors);
      }
    }
    tap_gradients(filters, depth * tile.padded, gradient, width);
  };
  tile_gradients(c, alpha, cells, dalpha, dcells, make);
}
}
