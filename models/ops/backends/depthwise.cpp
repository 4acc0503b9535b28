// Depth-wise convolution on the CPU with a kernel for every sample.  Every channel is a plane that is convolved by
// itself.  depthwise.py calls these functions and describes the arrays.
//
// A plane is copied into a padded plane, whose rows and columns are sorted by their remainder modulo the stride; equal
// remainders form a phase.  In this order all outputs form one long line, and the inputs of each tap form a line of the
// same length, which begins at a different place for every tap.

#include "mixing.h"

constexpr int UNROLL = 4;   // vectors of a line that are summed at a time
constexpr int TAPS = 8;     // taps whose gradients are summed at a time

static thread_local Buffer buffers[8];

// depthwise.py fills the fields in this order; pairs are rows and columns
struct Call {
  Int samples, channels, multiplier;  // multiplier: outputs of every channel
  Int in[2], out[2], kernel[2], stride[2], dilation[2], left[2];
  Int last;  // whether channels are innermost in memory; then the multiplier is 1
  Int n, width;                // number of cells, and of numbers in each
  Int tap_step, channel_step;  // distances in the kernels of a sample: of two taps, and of two outputs
  Int threads;

  Int taps() const { return kernel[0] * kernel[1]; }
  Int inputs() const { return in[0] * in[1]; }
  Int outputs() const { return out[0] * out[1]; }
  Int kernel_size() const { return channels * multiplier * taps(); }
  Mixture mixture() const { return {samples * kernel_size() / width, n, width, threads}; }
};

// offsets in a padded plane
struct Plane {
  Int size[2], line, phase, phases;  // size of a phase, length of its rows, numbers in it, number of phases
  Int length;                        // of the line from the first output to the last
  std::vector<Int> tap;              // where the inputs of every tap begin
  // the taps sorted by phase: which they are, where the outputs that read them begin, and the first tap of every phase
  std::vector<Int> sorted, back, first;
  // columns of x that are a stride apart, and adjacent in a padded plane
  struct Segment {
    Int from, at, count;  // where they begin in x and in the padded plane, and how many they are
  };
  std::vector<Segment> seen;
  bool all_seen;
  explicit Plane(const Call &c) {
    for (int d = 0; d < 2; d++) {
      const Int padded = (c.out[d] - 1) * c.stride[d] + (c.kernel[d] - 1) * c.dilation[d] + 1;
      size[d] = (padded + c.stride[d] - 1) / c.stride[d];
    }
    // a phase has room for whole vectors, so that writing these does not reach into the next phase
    line = size[1], phase = whole(size[0] * line + LANES), phases = c.stride[0] * c.stride[1];
    length = (c.out[0] - 1) * line + c.out[1];
    for (Int p = 0; p < phases; p++) {
      first.push_back(sorted.size());
      for (Int t = 0; t < c.taps(); t++) {
        const Int i = t / c.kernel[1] * c.dilation[0], j = t % c.kernel[1] * c.dilation[1];
        if (phase_of(c, i, j) == p) sorted.push_back(t), back.push_back(-(i / c.stride[0] * line + j / c.stride[1]));
      }
    }
    first.push_back(sorted.size());
    tap.resize(c.taps());
    for (Int p = 0; p < phases; p++)
      for (Int k = first[p]; k < first[p + 1]; k++) tap[sorted[k]] = p * phase - back[k];
    Int numbers = 0;
    const Int stride = c.stride[1], start = std::max<Int>(0, -c.left[1]);
    for (Int i = 0; i < c.in[0]; i++) {
      const Int row = i + c.left[0];
      if (row < 0 || row / c.stride[0] >= size[0]) continue;
      for (Int p = 0; p < stride; p++) {
        // the first column of x that is read and has this remainder
        const Int j = start + (p + stride - (start + c.left[1]) % stride) % stride;
        const Int at = (j + c.left[1]) / stride;
        const Int count = std::min((c.in[1] - j + stride - 1) / stride, line - at);
        if (count <= 0) continue;
        seen.push_back({i * c.in[1] + j, phase_of(c, row, p) * phase + row / c.stride[0] * line + at, count});
        numbers += count;
      }
    }
    all_seen = numbers == c.inputs();
  }
  static Int phase_of(const Call &c, Int i, Int j) { return i % c.stride[0] * c.stride[1] + j % c.stride[1]; }
  Int total() const { return phases * phase + LANES; }
  // room for the outputs, with a phase of zeros before them
  Int outputs() const { return phase + whole(std::max(length, phase)) + LANES; }
};

// Copies `count` numbers, `step` apart in `from`, to a line.  Whole vectors are read where `end` allows it, and their
// superfluous numbers are written as 0.
template <typename From>
static inline void load_line(const From *from, Int step, Int count, const From *end, real *to) {
  if (step == 1 && from + count + LANES <= end) {
    Int j = 0;
    for (; j + LANES <= count; j += LANES) store(to + j, load(from + j));
    if (j < count) store(to + j, first_lanes(load(from + j), count - j));
  } else if (step == 1) {
    for (Int j = 0; j < count; j++) to[j] = from[j];
  } else if (step == 2) {  // compilers vectorise a constant step
    for (Int j = 0; j < count; j++) to[j] = from[2 * j];
  } else {
    for (Int j = 0; j < count; j++) to[j] = from[j * step];
  }
}

// The inverse of load_line.  Whole vectors are written where `end` allows it; the numbers that this overwrites after
// the line are written later.
template <typename To>
static inline void store_line(const real *from, Int count, Int step, const To *end, To *to) {
  if (step == 1 && to + count + LANES <= end) {
    for (Int j = 0; j < count; j += LANES) store(to + j, load(from + j));
  } else if (step == 1) {
    for (Int j = 0; j < count; j++) to[j] = from[j];
  } else {
    for (Int j = 0; j < count; j++) to[j * step] = from[j];
  }
}

// to[e] (+)= sum_t kernel[t] from[at[t] + e] for whole vectors
template <int COUNT>
static void weighted(const real *from, const Int *at, const real *kernel, Int taps, real *to, bool add) {
  vec sum[COUNT];
  for (int v = 0; v < COUNT; v++) sum[v] = add ? load(to + v * LANES) : vec{};
  for (Int t = 0; t < taps; t++)
    for (int v = 0; v < COUNT; v++) sum[v] += kernel[t] * load(from + at[t] + v * LANES);
  for (int v = 0; v < COUNT; v++) store(to + v * LANES, sum[v]);
}

static void weighted_lines(const real *from, const Int *at, const real *kernel, Int taps, real *to, Int length,
                           bool add) {
  Int e = 0;
  for (; e + (UNROLL - 1) * LANES < length; e += UNROLL * LANES)
    weighted<UNROLL>(from + e, at, kernel, taps, to + e, add);
  for (; e < length; e += LANES) weighted<1>(from + e, at, kernel, taps, to + e, add);
}

// result[t] = sum_e a[e] b[at[t] + e] for COUNT taps; a is 0 from length on
template <int COUNT>
static void line_dots(const real *a, const real *b, const Int *at, Int length, real *result) {
  vec sum[COUNT] = {};
  for (Int e = 0; e < length; e += LANES) {
    const vec left = load(a + e);
    for (int t = 0; t < COUNT; t++) sum[t] += left * load(b + at[t] + e);
  }
  for (int t = 0; t < COUNT; t++) {
    real total = 0;
    for (int lane = 0; lane < LANES; lane++) total += sum[t][lane];
    result[t] = total;
  }
}

template <int COUNT>
static void line_dots_of(Int count, const real *a, const real *b, const Int *at, Int length, real *result) {
  if constexpr (COUNT > 1)
    if (count < COUNT) return line_dots_of<COUNT - 1>(count, a, b, at, length, result);
  line_dots<COUNT>(a, b, at, length, result);
}

// What a thread works on: one channel of a sample or, if channels are innermost in memory, LANES of them, transposed.
struct Work {
  const Call &c;
  const Plane &plane;
  Int x_step, y_step;            // distances of two channels, transposed or not
  real *padded, *line, *sums;    // padded plane of x, outputs, padded plane of dx
  real *kernel, *turned;         // taps of a kernel, and taps of one phase
  real *x, *y;                   // transposed channels
  Work(const Call &c, const Plane &plane) : c(c), plane(plane), x_step(c.inputs()), y_step(c.outputs()) {
    padded = buffers[0].get(plane.total());
    real *lines = buffers[1].get(plane.outputs());
    sums = buffers[2].get(plane.total());
    kernel = buffers[3].get(c.taps()), turned = buffers[6].get(c.taps());
    if (c.last) {
      // an odd number of vectors, because lines that are a power of two apart share the sets of a cache
      x_step = (x_step / LANES | 1) * LANES + 2 * LANES, y_step = (y_step / LANES | 1) * LANES + 2 * LANES;
      x = buffers[4].get(LANES * x_step), y = buffers[5].get(LANES * y_step);
    }
    // zeros for the padding, which is never written again
    std::fill(padded, padded + plane.total(), real(0));
    std::fill(lines, lines + plane.outputs(), real(0));
    line = lines + plane.phase;
  }
  template <typename From>
  void load_x(const From *from, const From *end) const {
    for (const auto &part : plane.seen) load_line(from + part.from, c.stride[1], part.count, end, padded + part.at);
  }
  void store_x(real *to) const {
    // if parts of x are not read, nothing may be written beyond the end of a line
    const real *end = plane.all_seen ? to + c.inputs() : to;
    for (const auto &part : plane.seen) store_line(sums + part.at, part.count, c.stride[1], end, to + part.from);
  }
  void load_y(const real *from, const real *end) const {
    for (Int i = 0; i < c.out[0]; i++) load_line(from + i * c.out[1], 1, c.out[1], end, line + i * plane.line);
  }
  template <typename To>
  void store_y(To *to) const {
    const To *end = to + c.outputs();
    for (Int i = 0; i < c.out[0]; i++) store_line(line + i * plane.line, c.out[1], 1, end, to + i * c.out[1]);
  }
};

// Calls use(work, sample, first channel, channels) for all samples and channels, in parallel.
template <typename Use>
static void all_channels(const Call &c, const Plane &plane, Use use) {
  const Int width = c.last ? LANES : 1, count = (c.channels + width - 1) / width;
#pragma omp parallel num_threads(c.threads)
  {
    const Work work(c, plane);
#pragma omp for schedule(static)
    for (Int item = 0; item < c.samples * count; item++) {
      const Int first = item % count * width;
      use(work, item / count, first, std::min(width, c.channels - first));
    }
  }
}

extern "C" {

// y = the convolution, in which the outputs of one channel are adjacent; `kernels` is scratch memory
void forward(const Call *call, const stored *x, const real *alpha, const real *cells, real *kernels, stored *y) {
  const Call &c = *call;
  const Plane plane(c);
  mix(c.mixture(), alpha, cells, kernels);
  all_channels(c, plane, [&](const Work &work, Int s, Int first, Int count) {
    const Int channel = s * c.channels + first;
    const stored *end = x + c.samples * c.channels * c.inputs();
    if (c.last)
      transpose_all(x + s * c.channels * c.inputs() + first, c.channels, c.inputs(), count, work.x, work.x_step);
    for (Int l = 0; l < count; l++) {
      if (c.last)
        work.load_x<real>(work.x + l * work.x_step, work.x + LANES * work.x_step);
      else
        work.load_x(x + channel * c.inputs(), end);
      for (Int m = 0; m < c.multiplier; m++) {
        const Int output = l * c.multiplier + m;
        const real *taps = kernels + s * c.kernel_size() + (first * c.multiplier + output) * c.channel_step;
        for (Int t = 0; t < c.taps(); t++) work.kernel[t] = taps[t * c.tap_step];
        weighted_lines(work.padded, plane.tap.data(), work.kernel, c.taps(), work.line, plane.length, false);
        if (c.last)
          work.store_y(work.y + l * work.y_step);
        else
          work.store_y(y + (channel * c.multiplier + output) * c.outputs());
      }
    }
    if (c.last)
      transpose_all(work.y, work.y_step, count, c.outputs(), y + s * c.channels * c.outputs() + first, c.channels);
  });
}

// number of partial sums for which dalpha needs room
Int parts_of_alpha(const Call *call) { return unmix_parts(call->mixture()); }

// Writes dx (only where x is read), dalpha and dcells, each unless null.  `kernels` and `dkernels` are scratch memory;
// `dkernels` is null if neither dalpha nor dcells is needed.
void backward(const Call *call, const real *dy, const real *x, const real *alpha, const real *cells, real *kernels,
              real *dkernels, real *dx, real *dalpha, real *dcells) {
  const Call &c = *call;
  const Plane plane(c);
  if (dx) mix(c.mixture(), alpha, cells, kernels);
  all_channels(c, plane, [&](const Work &work, Int s, Int first, Int count) {
    const Int channel = s * c.channels + first, image = s * c.channels * c.inputs() + first;
    const real *from = x + channel * c.inputs(), *end = x + c.samples * c.channels * c.inputs();
    const real *from_y = dy + channel * c.multiplier * c.outputs();
    const real *end_y = dy + c.samples * c.channels * c.multiplier * c.outputs();
    real *to = dx + channel * c.inputs();
    if (c.last) {
      if (dkernels) transpose_all(x + image, c.channels, c.inputs(), count, work.x, work.x_step);
      transpose_all(dy + s * c.channels * c.outputs() + first, c.channels, c.outputs(), count, work.y, work.y_step);
      from = to = work.x, end = work.x + LANES * work.x_step;
      from_y = work.y, end_y = work.y + LANES * work.y_step;
    }
    for (Int l = 0; l < count; l++) {
      if (dkernels) work.load_x<real>(from + l * work.x_step, end);
      for (Int m = 0; m < c.multiplier; m++) {
        const Int output = l * c.multiplier + m;
        const Int at = s * c.kernel_size() + (first * c.multiplier + output) * c.channel_step;
        work.load_y(from_y + output * work.y_step, end_y);
        for (Int t = 0; dkernels && t < c.taps(); t += TAPS) {
          const Int some = std::min<Int>(TAPS, c.taps() - t);
          line_dots_of<TAPS>(some, work.line, work.padded, plane.tap.data() + t, plane.length, work.kernel);
          for (Int k = 0; k < some; k++) dkernels[at + (t + k) * c.tap_step] = work.kernel[k];
        }
        for (Int p = 0; dx && p < plane.phases; p++) {
          const Int start = plane.first[p], taps = plane.first[p + 1] - start;
          for (Int k = 0; k < taps; k++) work.turned[k] = kernels[at + plane.sorted[start + k] * c.tap_step];
          weighted_lines(work.line, plane.back.data() + start, work.turned, taps, work.sums + p * plane.phase,
                         plane.phase - LANES, m > 0);
        }
      }
      if (!dx) continue;
      // transposed channels are written back whole, with zeros where x is not read
      if (c.last && !plane.all_seen) std::fill_n(to + l * work.x_step, c.inputs(), real(0));
      work.store_x(to + l * work.x_step);
    }
    if (dx && c.last) transpose_all(work.x, work.x_step, count, c.inputs(), dx + image, c.channels);
  });
  if (dkernels) unmix(c.mixture(), dkernels, alpha, cells, dalpha, dcells);
}
}
