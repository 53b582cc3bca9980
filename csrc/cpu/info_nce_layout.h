// How the rows of an InfoNCE problem are ordered, and which pairs of them are negatives of each other.
#pragma once

#include <limits>
#include <tuple>

#include "common/objectives.h"
#include "cpu/tiles.h"

namespace selfsup_kernels {

// Without labels the rows are view by view, row = view * batch + sample: the negatives of one view are one column of
// the tables, and the rows of one sample are excluded. With labels they are sorted by class, and views no longer
// matter: one column of negatives, and the rows of one class are excluded.
struct Layout {
  struct Segment {
    int column;  // of the tables
    int64_t begin, end;
  };

  ViewRule rule;  // with labels: one view
  int64_t batch, rows;
  bool labels = false;
  std::vector<int64_t> class_begin, class_end;  // of each row, with labels
  Blocks blocks;

  int64_t queue_column() const { return rule.views; }

  void cut_blocks() {
    int64_t limit = block_limit(rows);
    if (labels || rows <= limit) {
      blocks.add_even(rows, limit);
    } else if (batch >= limit) {  // a block within one view has one segment
      for (int v = 0; v < rule.views; ++v) blocks.add_even(batch, limit);
    } else {  // a few whole views
      int64_t group = limit / batch;
      for (int64_t v = 0; v < rule.views; v += group)
        blocks.begin.push_back(std::min<int64_t>(v + group, rule.views) * batch);
    }
  }

  // The parts of rows begin..end that belong to one column of the tables.
  std::vector<Segment> segments(int64_t begin, int64_t end) const {
    if (labels) return {{0, begin, end}};
    std::vector<Segment> result;
    while (begin < end) {
      int64_t view = begin / batch, stop = std::min(end, (view + 1) * batch);
      result.push_back({static_cast<int>(view), begin, stop});
      begin = stop;
    }
    return result;
  }

  // Whether rows of columns u and v are ever negatives of each other.
  bool meets(int u, int v) const { return labels || rule.negative(u, v); }

  // Whether the tile rows i x rows j holds any negatives.
  bool wanted(const std::vector<Segment>& i, const std::vector<Segment>& j) const {
    if (labels)
      return !(
          class_begin[i[0].begin] <= j[0].begin && j[0].end <= class_end[i[0].begin] &&
          class_begin[i[0].begin] == class_begin[i[0].end - 1]);
    for (const Segment& a : i)
      for (const Segment& b : j)
        if (meets(a.column, b.column)) return true;
    return false;
  }

  // Calls mark(column) for the tile columns, counted from `begin`, that are no negatives of `row`.
  template <typename Mark>
  void excluded(int64_t row, const std::vector<Segment>& columns, Mark mark) const {
    int64_t origin = columns.front().begin;
    if (labels) {
      int64_t from = std::max(class_begin[row], columns[0].begin), to = std::min(class_end[row], columns[0].end);
      for (int64_t j = from; j < to; ++j) mark(j - origin);
      return;
    }
    int64_t sample = row % batch;
    for (const Segment& s : columns) {
      int64_t j = s.column * batch + sample;
      if (s.begin <= j && j < s.end) mark(j - origin);
    }
  }
};

// weight * exp(x - ref) as weight' * exp(x - ref') with ref' a T: what rounding takes from the reference point, which
// may be large at low temperatures, goes into the weight.
template <typename T>
std::pair<T, T> split_reference(double ref, double weight) {
  T rounded = static_cast<T>(ref);
  return {rounded, static_cast<T>(std::isinf(ref) ? weight : weight * std::exp(static_cast<double>(rounded) - ref))};
}

}  // namespace selfsup_kernels
