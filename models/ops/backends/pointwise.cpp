// Point-wise convolution on the CPU with a kernel for every sample, for maps that are large compared with the kernels:
// these are mixed once and stay in the cache for all positions.  pointwise.py calls these functions and describes the
// arrays.

#include "mixing.h"

// at most this many positions, and bytes of their inputs, are processed at a time, to fit a second-level cache
constexpr Int POSITIONS = 8 * TILE, CACHE_BYTES = 256 << 10;
// positions over which gradients of kernels are summed at a time
constexpr Int SUMMED = 128;

static thread_local Buffer buffers[2];

// pointwise.py fills the fields in this order
struct Call {
  Int samples, g_out, g_in, n, c_out, c_in, positions;  // samples: counted once per group
  Int threads;

  Int inputs() const { return g_in * c_in; }
  Int outputs() const { return g_out * c_out; }
  Int kernel_size() const { return inputs() * outputs(); }
  Mixture mixture() const { return {samples * g_out * g_in, n, c_out * c_in, threads}; }
};

// Where the rows of a kernel begin, and the groups of channels over which a product sums.
struct Kernel {
  std::vector<Int> rows, groups;
  Int step, depth;  // distance of two channels in a group, and their number
};

// a row for every output, summed over the inputs
static Kernel of_outputs(const Call &c) {
  const Int cell = c.c_out * c.c_in;
  Kernel kernel = {{}, {}, 1, c.c_in};
  for (Int o = 0; o < c.outputs(); o++)
    kernel.rows.push_back(o / c.c_out * c.g_in * cell + o % c.c_out * c.c_in);
  for (Int g = 0; g < c.g_in; g++) kernel.groups.push_back(g * cell);
  return kernel;
}

// y[s][row] = sum over channels of kernel[s][row][channel] x[s][channel], for all positions
template <typename Number>
static void multiply(const Call &c, const Kernel &kernel, const real *kernels, Int channels, const Number *x,
                     Number *y) {
  const Int block = std::max<Int>(TILE, std::min(POSITIONS, CACHE_BYTES / Int(sizeof(real)) / channels / TILE * TILE));
  const Int blocks = (c.positions + block - 1) / block, rows = kernel.rows.size();
  const std::vector<Int> y_rows = steps(rows, c.positions);
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (Int item = 0; item < c.samples * blocks; item++) {
    const Int s = item / blocks, first = item % blocks * block;
    const Int count = std::min(block, c.positions - first), step = whole(count);
    real *packed = buffers[0].get(channels * step);
    pack_rows(x + s * channels * c.positions + first, channels, c.positions, count, packed, step);
    Product p = {};
    p.a = kernels + s * c.kernel_size(), p.a_rows = kernel.rows.data(), p.a_step = kernel.step;
    p.a_groups = kernel.groups.data(), p.groups = kernel.groups.size(), p.depth = kernel.depth;
    p.b = packed, p.b_step = step, p.b_group = kernel.depth * step;
    p.c_rows = y_rows.data();
    columns_product(p, y + s * rows * c.positions + first, rows, count, buffers[1].get(ROWS * TILE));
  }
}

extern "C" {

// Writes y [s][output][position]; `kernels` is scratch memory.
void forward(const Call *call, const stored *x, const real *alpha, const real *cells, real *kernels, stored *y) {
  const Call &c = *call;
  mix(c.mixture(), alpha, cells, kernels);
  multiply(c, of_outputs(c), kernels, c.inputs(), x, y);
}

// number of partial sums for which dalpha needs room
Int parts_of_alpha(const Call *call) { return unmix_parts(call->mixture()); }

// Writes dx, dalpha and dcells, each unless null.  `kernels` and `dkernels` are scratch memory; `dkernels` is null if
// neither dalpha nor dcells is needed.
void backward(const Call *call, const real *dy, const real *x, const real *alpha, const real *cells, real *kernels,
              real *dkernels, real *dx, real *dalpha, real *dcells) {
  const Call &c = *call;
  const Int cell = c.c_out * c.c_in;
  if (dx) {
    mix(c.mixture(), alpha, cells, kernels);
    Kernel kernel = {{}, {}, c.c_in, c.c_out};
    for (Int i = 0; i < c.inputs(); i++) kernel.rows.push_back(i / c.c_in * cell + i % c.c_in);
    for (Int g = 0; g < c.g_out; g++) kernel.groups.push_back(g * c.g_in * cell);
    multiply(c, kernel, kernels, c.outputs(), dy, dx);
  }
  if (!dkernels) return;
  // split the outputs if there are too few blocks of inputs to share among the threads
  const Int blocks = c.samples * c.g_in, parts = std::min(c.outputs(), (4 * c.threads + blocks - 1) / blocks);
  const Kernel kernel = of_outputs(c);
  const std::vector<Int> dy_rows = steps(c.outputs(), c.positions);
  const Int step = whole(c.c_in);
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (Int item = 0; item < blocks * parts; item++) {
    const Int s = item / parts / c.g_in, i = item / parts % c.g_in;
    const Int r0 = c.outputs() * (item % parts) / parts, r1 = c.outputs() * (item % parts + 1) / parts;
    real *turned = buffers[0].get(SUMMED * step);
    for (Int first = 0; first < c.positions; first += SUMMED) {
      const Int count = std::min(SUMMED, c.positions - first);
      transpose_all(x + (s * c.inputs() + i * c.c_in) * c.positions + first, c.positions, c.c_in, count, turned, step);
      Product p = {};
      p.a = dy + s * c.outputs() * c.positions + first, p.a_rows = dy_rows.data() + r0, p.a_step = 1;
      p.b = turned, p.b_step = step;
      p.c_rows = kernel.rows.data() + r0, p.depth = count, p.groups = 1, p.add = first > 0;
      real *to = dkernels + s * c.kernel_size() + i * cell;
      columns_product(p, to, r1 - r0, c.c_in, buffers[1].get(ROWS * TILE));
    }
  }
  unmix(c.mixture(), dkernels, alpha, cells, dalpha, dcells);
}
}
