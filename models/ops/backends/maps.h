// Maps as the compiled backends read and write them: every position is a row of channels.
#pragma once

#include "registers.h"

static thread_local Buffer turned_map;

// A block of channels of one image, with any layout of x or y: the distances of two channels and of two positions, one
// of which is 1; and where its positions lie among the rows, null if they are all rows in order.
struct Block {
  Int channel, position;
  Int channels, positions;
  const Int *rows;
};

// Copies a block to rows that are `width` apart.
template <typename Number>
static void to_rows(const Block &b, const Number *from, real *to, Int width) {
  if (b.channel == 1) {
    for (Int p = 0; p < b.positions; p++)
      copy(from + p * b.position, b.channels, to + (b.rows ? b.rows[p] : p) * width);
    return;
  }
  if (!b.rows) return transpose_all(from, b.channel, b.channels, b.positions, to, width);
  real *turned = turned_map.get(LANES * b.channels);
  for (Int p = 0; p < b.positions; p += LANES) {
    // the last positions overlap those before them
    const Int some = std::min<Int>(LANES, b.positions), at = std::min(p, b.positions - some);
    transpose_all(from + at, b.channel, b.channels, some, turned, b.channels);
    for (Int i = 0; i < some; i++) copy(turned + i * b.channels, b.channels, to + b.rows[at + i] * width);
  }
}

// The inverse of `to_rows`.
template <typename Number>
static void from_rows(const Block &b, const real *from, Int width, Number *to) {
  if (b.channel == 1) {
    for (Int p = 0; p < b.positions; p++)
      copy(from + (b.rows ? b.rows[p] : p) * width, b.channels, to + p * b.position);
    return;
  }
  if (!b.rows) return transpose_all(from, width, b.positions, b.channels, to, b.channel);
  real *turned = turned_map.get(LANES * b.channels);
  for (Int p = 0; p < b.positions; p += LANES) {
    const Int some = std::min<Int>(LANES, b.positions), at = std::min(p, b.positions - some);
    for (Int i = 0; i < some; i++) copy(from + b.rows[at + i] * width, b.channels, turned + i * b.channels);
    transpose_all(turned, b.channels, some, b.channels, to + at, b.channel);
  }
}
