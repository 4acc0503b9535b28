// Mixture convolution on the CPU for few samples.  The warehouse is then larger than all kernels, and reading it takes
// as long as the arithmetic.  It is read once, some output channels of all cells at a time; their kernels are mixed into
// the cache, transposed there and multiplied at once.  streamed.py calls `forward` and describes the arrays.

#include <atomic>

#include "maps.h"
#include "streaming.h"

// numbers of mixed kernels, and of transposed ones, that fit a second-level cache
constexpr Int MIXED_NUMBERS = (640 << 10) / Int(sizeof(real)), TURNED_NUMBERS = (128 << 10) / Int(sizeof(real));
// channels of x that a thread transposes at a time
constexpr Int CHANNELS = 64;

static thread_local Buffer buffers[3];

// streamed.py fills the fields in this order
struct Call {
  Int samples, g_out, g_in, taps, n, c_out, c_in, positions;
  Int alpha_sample, alpha_row;  // distances in alpha
  Int inputs, rows, width;      // positions of x, and of x with its padding; distance of two positions
  Int last, padded;             // whether channels are innermost in memory, and whether x has padding
  Int threads;
  // where the window of every output begins in the rows of x, and the taps in a window; the positions of x, counted in
  // rows; the row of alpha at which the mixtures of every tap begin
  const Int *position, *tap, *seen, *mixture;

  Int channels() const { return g_in * c_in; }
  Int outputs() const { return g_out * c_out; }
  Int segments() const { return g_in * taps; }  // of a sum: blocks of inputs, and taps
};

// Copies x to rows of channels, with zeros for the padding.
static void arrange(const Call &c, const real *x, real *to) {
  const Int channels = c.channels(), blocks = std::max<Int>(1, channels / CHANNELS);
#pragma omp parallel for schedule(static) num_threads(c.threads)
  for (Int item = 0; item < c.samples * blocks; item++) {
    const Int s = item / blocks, first = channels * (item % blocks) / blocks;
    const Int count = channels * (item % blocks + 1) / blocks - first;
    real *rows = to + s * c.rows * c.width + first;
    for (Int p = 0; c.padded && p < c.rows; p++) std::fill_n(rows + p * c.width, count, real(0));
    const Block part = {c.last ? 1 : c.inputs, c.last ? channels : 1, count, c.inputs, c.padded ? c.seen : nullptr};
    to_rows(part, x + s * c.inputs * channels + first * part.channel, rows, c.width);
  }
}

// Some output channels of a cell, and some of the outputs (sample, block of outputs) that are made of such cells.
struct Item {
  Int first, width, padded;  // channels, and these padded to whole vectors
  Int begin, end;            // outputs
};

// y of one output for the channels of an item, from their mixed kernels [segment][channel][input]
static void convolve(const Call &c, const Item &item, const real *x, const real *kernels, const Int *x_at,
                     Int output, real *y) {
  const Int size = c.c_in * item.padded, some = std::max<Int>(1, std::min(c.segments(), TURNED_NUMBERS / size));
  const Int s = output / c.g_out, channel = output % c.g_out * c.c_out + item.first;
  // whole vectors can be written to y itself, if its channels are innermost
  const bool direct = c.last && item.width == item.padded;
  real *turned = buffers[0].get(some * size);
  real *target = direct ? y + s * c.positions * c.outputs() + channel : buffers[1].get(c.positions * item.padded);
  const Int step = direct ? c.outputs() : item.padded;
  static thread_local std::vector<Int> y_rows;
  y_rows.resize(c.positions);
  for (Int p = 0; p < c.positions; p++) y_rows[p] = p * step;
  if (item.width < item.padded) std::fill_n(turned, some * size, real(0));
  for (Int first = 0; first < c.segments(); first += some) {
    const Int count = std::min(some, c.segments() - first);
    for (Int i = 0; i < count; i++)
      transpose_all(kernels + (first + i) * item.width * c.c_in, c.c_in, item.width, c.c_in, turned + i * size,
                    item.padded);
    Product p = {};
    p.a = x + s * c.rows * c.width, p.a_rows = c.position, p.a_step = 1, p.a_groups = x_at + first;
    p.b = turned, p.b_step = item.padded, p.b_group = size;
    p.c = target, p.c_rows = y_rows.data();
    p.depth = c.c_in, p.groups = count, p.add = first > 0;
    product(p, c.positions, item.padded / LANES);
  }
  if (direct) return;
  if (c.last)
    for (Int p = 0; p < c.positions; p++)
      std::memcpy(y + (s * c.positions + p) * c.outputs() + channel, target + p * step, item.width * sizeof(real));
  else
    transpose_all(target, step, c.positions, item.width, y + (s * c.outputs() + channel) * c.positions, c.positions);
}

// Mixes the kernels of an item, some outputs at a time, and calls `convolve` with them.
static void mix_and_convolve(const Call &c, const Item &item, const real *x, const real *alpha, const real *cells,
                             const Int *x_at, real *y) {
  const Int size = item.width * c.c_in, segments = c.segments();
  const Int some = std::max<Int>(1, MIXED_NUMBERS / (segments * size));
  std::vector<Int> rows(std::min(some, item.end - item.begin) * segments);
  real *kernels = buffers[2].get(rows.size() * size);
  for (Int output = item.begin; output < item.end; output += some) {
    const Int count = std::min(some, item.end - output);
    for (Int i = 0; i < count * segments; i++) {
      const Int o = output + i / segments, g = i % segments / c.taps, t = i % c.taps;
      rows[i] = o / c.g_out * c.alpha_sample + (c.mixture[t] + o % c.g_out * c.g_in + g) * c.alpha_row;
    }
    stream({cells + item.first * c.c_in, c.c_out * c.c_in, alpha, rows.data(), count * segments, kernels, size}, c.n,
           size);
    for (Int i = 0; i < count; i++) convolve(c, item, x, kernels + i * segments * size, x_at, output + i, y);
  }
}

// Whether to go through a warehouse backwards: every other time, so that the cells that were read last, which are still
// in the cache, are read first.
static bool backwards(const real *cells) {
  static std::atomic<unsigned char> turns[64];
  return turns[reinterpret_cast<uintptr_t>(cells) / 4096 * 0x9E3779B97F4A7C15u >> 58].fetch_xor(1) & 1;
}

extern "C" {

// Writes y, which has the layout of x.  `rows` is scratch memory for x in rows of channels; null if x is used as it is.
void forward(const Call *call, const real *x, const real *alpha, const real *cells, real *rows, real *y) {
  const Call &c = *call;
  if (rows) arrange(c, x, rows), x = rows;
  std::vector<Int> x_at(c.segments());
  for (Int i = 0; i < c.segments(); i++) x_at[i] = i / c.taps * c.c_in + c.tap[i % c.taps];
  // narrow tiles if wide ones are too few to share among the threads, or do not fit the cache
  const Int outputs = c.samples * c.g_out;
  const bool few = (c.c_out + TILE - 1) / TILE * outputs < 2 * c.threads;
  const bool narrow = few || c.segments() * c.c_in * TILE > MIXED_NUMBERS;
  const Int width = narrow ? LANES : TILE, tiles = (c.c_out + width - 1) / width;
  const Int parts = std::min(outputs, std::max<Int>(1, (2 * c.threads + tiles - 1) / tiles)), items = tiles * parts;
  const bool reverse = backwards(cells);
#pragma omp parallel for schedule(dynamic, 1) num_threads(c.threads)
  for (Int i = 0; i < items; i++) {
    const Int at = reverse ? items - 1 - i : i, first = at / parts * width, part = at % parts;
    Item item = {first, std::min(width, c.c_out - first), 0, outputs * part / parts, outputs * (part + 1) / parts};
    item.padded = whole(item.width);
    mix_and_convolve(c, item, x, alpha, cells, x_at.data(), y);
  }
}
}
