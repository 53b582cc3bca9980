// The order of the rows of an InfoNCE problem, and which pairs of rows are negatives.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <tuple>

#include "cpu/objectives.h"
#include "cpu/tiles.h"

namespace selfsup_kernels {

// In most problems, row = view * batch + sample. The negatives of each view are one column of the tables. Rows of the
// same sample are excluded, with duplicates those of all samples that share its id. If the call is crossed (labels, and
// a denominator for each other view), the columns hold positives as well, and only a sample that is alone in its class
// is excluded.
//
// If the call is labelled (labels, and one denominator), rows are sorted by class and views do not matter: there is one
// column of negatives, and rows of the same class are excluded.
//
// If the batch is spread over processes, this process owns the rows of its samples. Only owned rows get tables and a
// gradient; the rest serve as columns. Sorted by class, the owned rows come first, so that a class is two runs of rows.
struct Layout {
  struct Segment {
    int column;  // index into the tables
    int64_t begin, end;
  };
  struct Run {
    int64_t begin = 0, end = 0;

    int64_t size() const { return end - begin; }
    bool holds(int64_t row) const { return begin <= row && row < end; }
  };
  struct Class {
    Run runs[2];  // its owned rows, its other rows

    int64_t size() const { return runs[0].size() + runs[1].size(); }
  };

  ViewRule rule;  // with labels: one view
  int64_t views, batch, rows;
  int64_t first, count;         // the owned samples
  bool labels = false;          // the call is labelled
  std::vector<Class> class_of;  // then for each row
  bool crossed = false;
  std::vector<int64_t> by_id;  // with duplicates and if crossed: the samples sorted by id, then by number
  std::vector<Run> sharing;    // for each sample: those in `by_id` that share its id
  Blocks blocks;

  int64_t queue_column() const { return rule.views; }
  bool whole() const { return count == batch; }
  int64_t owned_rows() const { return views * count; }

  bool owns(int64_t row) const {
    if (labels) return row < owned_rows();
    int64_t sample = row % batch;
    return first <= sample && sample < first + count;
  }

  void cut_blocks() {
    const int64_t limit = block_limit(rows);
    if (labels) {
      blocks.add_even(owned_rows(), limit);
      blocks.add_even(rows - owned_rows(), limit);
    } else if (!whole()) {  // no block mixes owned and other rows
      for (int v = 0; v < rule.views; ++v)
        for (int64_t part : {first, count, batch - first - count}) blocks.add_even(part, limit);
    } else if (rows <= limit) {
      blocks.add_even(rows, limit);
    } else if (batch >= limit) {  // a block within one view has one segment
      for (int v = 0; v < rule.views; ++v) blocks.add_even(batch, limit);
    } else {  // a few whole views
      int64_t group = limit / batch;
      for (int64_t v = 0; v < rule.views; v += group)
        blocks.begin.push_back(std::min<int64_t>(v + group, rule.views) * batch);
    }
  }

  // Splits rows begin..end by their column of the tables.
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

  // True if rows of columns u and v can be negatives of each other.
  bool meets(int u, int v) const { return labels || rule.negative(u, v); }

  // True if the tile (rows i) x (rows j) holds any negatives.
  bool wanted(const std::vector<Segment>& i, const std::vector<Segment>& j) const {
    if (labels) {
      auto within = [](const Segment& s, const Class& c) {
        for (const Run& run : c.runs)
          if (run.begin <= s.begin && s.end <= run.end) return true;
        return false;
      };
      const Class& c = class_of[i[0].begin];
      return !(within(i[0], c) && within(j[0], c));
    }
    for (const Segment& a : i)
      for (const Segment& b : j)
        if (meets(a.column, b.column)) return true;
    return false;
  }

  // True if the call is crossed, and others share the label of the row's sample.
  bool several(int64_t row) const { return crossed && sharing[row % batch].size() > 1; }

  // True if some row is a negative of `row` (or several positives are in its sums).
  bool has_negatives(int64_t row) const {
    if (labels) return class_of[row].size() < rows;
    if (by_id.empty() || crossed) return batch > 1;
    return sharing[row % batch].size() < batch;
  }

  // Calls mark(column) for the tile's columns whose samples share the id of the row's sample.
  template <typename Mark>
  void sharing_id(int64_t row, const std::vector<Segment>& columns, Mark mark) const {
    const Run& run = sharing[row % batch];
    const auto first = by_id.begin() + run.begin, last = by_id.begin() + run.end;
    for (const Segment& s : columns) {
      const int64_t view = s.column * batch;
      for (auto at = std::lower_bound(first, last, s.begin - view); at != last && *at < s.end - view; ++at)
        mark(*at + view - columns.front().begin);
    }
  }

  // Calls mark(column) for the tile's columns that are not negatives of `row`; they are counted from the first segment.
  template <typename Mark>
  void excluded(int64_t row, const std::vector<Segment>& columns, Mark mark) const {
    int64_t origin = columns.front().begin;
    if (labels) {
      for (const Run& run : class_of[row].runs) {
        int64_t from = std::max(run.begin, columns[0].begin), to = std::min(run.end, columns[0].end);
        for (int64_t j = from; j < to; ++j) mark(j - origin);
      }
      return;
    }
    if (several(row)) return;
    if (!by_id.empty()) return sharing_id(row, columns, mark);
    int64_t sample = row % batch;
    for (const Segment& s : columns) {
      int64_t j = s.column * batch + sample;
      if (s.begin <= j && j < s.end) mark(j - origin);
    }
  }
};

// True if rows are sorted by class.
inline bool labelled(const Call& call) {
  return call.ids == static_cast<int64_t>(Ids::LABELS) && call.columns == static_cast<int64_t>(Columns::ALL);
}

// The layout by views; `ids` has a value unless `call.ids` is NONE.
Layout view_layout(const Call& call, const std::optional<Tensor>& ids);

// The layout with samples sorted by label: row = (index in `order`) * views + view. Fills `order` if `sort`.
Layout label_layout(const Call& call, const Tensor& labels, int64_t* order, bool sort);

// Returns (ref', weight') with weight' * exp(x - ref') = weight * exp(x - ref) and ref' a T. At low temperatures `ref`
// may be large; the weight absorbs its rounding error.
template <typename T>
std::pair<T, T> split_reference(double ref, double weight) {
  T rounded = static_cast<T>(ref);
  return {rounded, static_cast<T>(std::isinf(ref) ? weight : weight * std::exp(static_cast<double>(rounded) - ref))};
}

}  // namespace selfsup_kernels
