// KernelWarehouse's attention on the CPU in one call: FC, norm, ReLU, FC, and z / sum |z|.  Every step is so small that
// calling an operation of PyTorch for it takes longer than the step.  ../attention.py calls `forward` and describes the
// arrays.

#include <cmath>

#include "registers.h"

// matrices of fewer numbers are not worth waking up a thread
constexpr Int FEW_NUMBERS = 64 << 10;

static thread_local Buffer buffers[4];

// ../attention.py fills the fields in this order
struct Call {
  Int samples, channels, hidden, mixtures, cells;  // cells: with the zero cell
  Int threads;
  double norm_epsilon, epsilon;  // added to the variance, and to the sum of |z|

  Int logits() const { return mixtures * cells; }
};

// out[r] = sum_k rows[r][k] v[k] for `count` rows that begin at `first`, where v is padded to whole vectors with 0, and
// `numbers` are those of the whole matrix
static void times_vector(const real *matrix, Int numbers, Int length, Int first, Int count, const real *v, real *out) {
  real sums[LANES * LANES], turned[LANES * LANES], last[LANES];
  const Int full = length / LANES * LANES, rest = length - full;
  for (Int r = 0; r < count; r += LANES) {
    const Int some = std::min<Int>(LANES, count - r);
    for (Int i = 0; i < some; i++) {
      const Int at = (first + r + i) * length;
      vec sum = {};
      for (Int k = 0; k < full; k += LANES) sum += load(matrix + at + k) * load(v + k);
      if (rest) {
        const real *from = matrix + at + full;
        if (at + full + LANES > numbers) from = static_cast<real *>(std::memcpy(last, from, rest * sizeof(real)));
        sum += first_lanes(load(from), rest) * load(v + full);
      }
      store(sums + i * LANES, sum);
    }
    transpose(sums, LANES, turned, LANES);
    vec total = {};
    for (Int l = 0; l < LANES; l++) total += load(turned + l * LANES);
    store(sums, total);
    std::memcpy(out + r, sums, some * sizeof(real));
  }
}

// the same for all rows, shared among the threads
static void matrix_times_vector(const Call &c, const real *matrix, Int rows, Int length, const real *v, real *out) {
  const Int parts = rows * length < FEW_NUMBERS ? 1 : c.threads;
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
  for (Int part = 0; part < parts; part++) {
    const Int first = rows * part / parts;
    times_vector(matrix, rows * length, length, first, rows * (part + 1) / parts - first, v, out + first);
  }
}

// to[j] = z[j] / (sum |z| + epsilon) for all cells but the last, blended with beta
static void normalise(const Call &c, const real *z, const real *beta, real temperature, real *to) {
  vec sums = {};
  for (Int j = 0; j < c.cells; j += LANES) {
    const vec value = first_lanes(load(z + j), std::min<Int>(LANES, c.cells - j));
    sums += value < 0 ? -value : value;
  }
  real total = 0;
  for (int l = 0; l < LANES; l++) total += sums[l];
  total += c.epsilon;
  if (!beta || temperature == 0) {
    for (Int j = 0; j < c.cells - 1; j++) to[j] = z[j] / total;
    return;
  }
  for (Int j = 0; j < c.cells - 1; j++) {
    const real own = z[j] / total, difference = beta[j] - own;
    // as torch.lerp does
    to[j] = temperature < real(0.5) ? own + temperature * difference : beta[j] - difference * (1 - temperature);
  }
}

extern "C" {

// Writes alpha [sample][mixture][cell], without the zero cell.  `beta` is null where no temperature blends it in.
void forward(const Call *call, const real *pooled, const real *matrix_1, const real *mean, const real *variance,
             const real *scale, const real *shift, const real *matrix_2, const real *bias, const real *beta,
             const real *temperature, real *alpha) {
  const Call &c = *call;
  real *x = buffers[0].get(whole(c.channels)), *h = buffers[1].get(whole(c.hidden));
  real *z = buffers[2].get(c.logits() + LANES);
  for (Int s = 0; s < c.samples; s++) {
    pack_rows(pooled + s * c.channels, 1, 0, c.channels, x, whole(c.channels));
    matrix_times_vector(c, matrix_1, c.hidden, c.channels, x, h);
    for (Int k = 0; k < whole(c.hidden); k++) {
      real value = 0;
      if (k < c.hidden) value = (h[k] - mean[k]) / std::sqrt(variance[k] + real(c.norm_epsilon)) * scale[k] + shift[k];
      h[k] = value < 0 ? 0 : value;  // keeps NaN, as torch.relu does
    }
    matrix_times_vector(c, matrix_2, c.logits(), c.hidden, h, z);
    for (Int i = 0; i < c.logits(); i++) z[i] += bias[i];
    for (Int m = 0; m < c.mixtures; m++)
      normalise(c, z + m * c.cells, beta ? beta + m * c.cells : nullptr, *temperature,
                alpha + (s * c.mixtures + m) * (c.cells - 1));
  }
}
}
