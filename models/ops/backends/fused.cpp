// Mixture convolution on the CPU in tiles: a tile of every sample's kernel is mixed, and multiplied while it is in the
// cache.  fused.py calls these functions and describes the arrays.
//
// One routine does all work, C[i, :] (+)= sum_k A[i, k] B[k, :], with rows of C held in registers, and tables that tell
// where the rows of A, B and C begin.  The order of every sum is the same for all numbers of threads.

#include "gradients.h"

// fused.py fills the fields in this order
struct Call : Shape {
  Int positions;               // of y
  Int inputs, rows;            // positions of x, and of x with its padding
  Int x_last, y_last;          // whether channels of x and of y are innermost in memory
  // the first position of the window of every output in x with its padding, the taps in a window, and the positions of
  // x, which are null without padding
  const Int *position, *tap, *seen;

  Map x_map() const { return Shape::x_map(rows); }
  Map y_map() const { return Shape::y_map(positions); }
};

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

// tables of one call, shared by its threads: the positions of x of every output, the taps, and the positions of y
struct Rows {
  MapRows window, tap, y;
  explicit Rows(const Call &c)
      : window(c.x_map(), c.position, c.positions), tap(c.x_map(), c.tap, c.taps), y(c.y_map(), nullptr, c.positions) {}
};

extern "C" {

// Writes y; `x_rows` and `y_rows` are scratch memory for x and y as maps.
void forward(const Call *call, const stored *x, const real *alpha, const real *cells, real *x_rows, real *y_rows,
             stored *y) {
  const Call &c = *call;
  const Map x_map = c.x_map(), y_map = c.y_map();
  const Rows rows(c);
  arrange(x_map, c.inputs, c.x_last, c.seen, c.threads, x, x_rows);
  const auto pack = [&](const Tile &tile, Int k0, Int depth, real *out) {
    pack_outputs(c, cells, tile, k0, depth, out);
  };
  const auto use = [&](const Tile &tile, Int u, Int k0, Int depth, const real *kernels) {
    const Int x_step = x_map.step(k0);
    Product p = {};
    p.a = x_rows + c.x_at(x_map, u, k0), p.a_rows = rows.window.of(x_step), p.a_step = 1, p.a_groups = rows.tap.of(x_step);
    p.b = kernels, p.b_step = tile.padded, p.b_group = WIDTH;
    p.c = y_rows + c.y_at(y_map, u, tile.first), p.c_rows = rows.y.of(y_map.step(tile.first));
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
  const Rows rows(c);
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (Int block = 0; block < x_map.images * x_map.blocks; block++)
    std::fill_n(x_rows + block * x_map.size(), x_map.size(), real(0));
  const auto pack = [&](const Tile &tile, Int k0, Int depth, real *out) {
    pack_inputs(c, cells, tile, k0, depth, out, WIDTH);
  };
  const auto use = [&](const Tile &tile, Int u, Int k0, Int depth, const real *kernels) {
    const Int x_step = x_map.step(tile.first);
    for (Int t = 0; t < c.taps; t++) {
      Product p = {};
      p.a = y_rows + c.y_at(y_map, u, k0), p.a_rows = rows.y.of(y_map.step(k0)), p.a_step = 1;
      p.b = kernels + t * WIDTH, p.b_step = tile.padded;
      p.c = x_rows + c.x_at(x_map, u, tile.first) + rows.tap.of(x_step)[t], p.c_rows = rows.window.of(x_step);
      p.depth = depth, p.groups = 1, p.add = true;
      product(p, c.positions, tile.vectors);
    }
  };
  mixed_tiles(c, alpha, c.c_in, c.c_out, c.g_out * c.g_in, pack, use);
  restore(x_map, c.inputs, c.x_last, c.seen, c.threads, x_rows, dx);
}

// number of partial sums of dalpha that kernel_gradients writes
Int parts_of_alpha(const Call *call) { return gradient_parts(*call); }

// Writes dalpha [part][unit, tap][n], which the caller sums over parts, and dcells [n][c_out][c_in], each unless null;
// `x_rows` is scratch memory for x as a map.
void kernel_gradients(const Call *call, const real *y_rows, const stored *x, const real *alpha, const real *cells,
                      real *x_rows, real *dalpha, real *dcells) {
  const Call &c = *call;
  const Map x_map = c.x_map(), y_map = c.y_map();
  arrange(x_map, c.inputs, c.x_last, c.seen, c.threads, x, x_rows);
  const Rows rows(c);
  const auto make = [&](const Tile &tile, Int u, Int k0, Int depth, const Int *channels, const Int *lines, real *gradient,
                        Int width) {
    const Int x_step = x_map.step(tile.first);
    for (Int t = 0; t < c.taps; t++) {
      Product p = {};
      p.a = y_rows + c.y_at(y_map, u, k0), p.a_rows = channels, p.a_step = y_map.step(k0);
      p.b = x_rows + c.x_at(x_map, u, tile.first) + rows.tap.of(x_step)[t], p.b_rows = rows.window.of(x_step);
      p.c = gradient + t * width, p.c_rows = lines;
      p.depth = c.positions, p.groups = 1;
      product(p, depth, tile.vectors);
    }
  };
  tile_gradients(c, alpha, cells, dalpha, dcells, make);
}
}
