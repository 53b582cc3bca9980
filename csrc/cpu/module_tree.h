// The tensors of a tree of modules, found again without a walk while the tree is the same.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace selfsup_kernels {

// Remembers each module's class and the entries of its dictionaries, by address. None of these objects are kept alive:
// a new one at the address of a deleted one, under the same name, is as good as the old one. (Where several names share
// an object, they still do.) An address is only followed after the parent's entry has matched it.
class ModuleTree {
 public:
  // `modules`: every module once, parents first. `positions`: the position in the result by id(tensor).
  // `classes`: those of tensors without operators of their own; a tree where others are wanted never matches.
  ModuleTree(const pybind11::list& modules, const pybind11::dict& positions, const pybind11::tuple& classes)
      : size_(positions.size()) {
    std::vector<bool> taken(size_, false);
    for (const pybind11::handle module : modules) {
      Node node{module.ptr(), Py_TYPE(module.ptr()), {}, {}, {}};
      const pybind11::object attributes = attributes_of(module.ptr());
      for (int d = 0; d < 3; ++d) {
        node.places[d] = place_of(attributes.ptr(), d);
        PyObject* entries = entries_of(attributes.ptr(), d, node.places[d]);
        usable_ = usable_ && entries != nullptr && module.attr(names()[d]).ptr() == entries;
        if (!usable_) return;
        node.sizes[d] = PyDict_GET_SIZE(entries);
        PyObject *key, *value;
        for (Py_ssize_t at = 0; PyDict_Next(entries, &at, &key, &value);) {
          usable_ = usable_ && PyUnicode_CheckExact(key);  // owned, so it must not lead to other objects
          Py_ssize_t position = -1;
          if (d > 0 && value != Py_None) {
            const auto id = pybind11::reinterpret_steal<pybind11::object>(PyLong_FromVoidPtr(value));
            if (positions.contains(id)) position = positions[id].cast<Py_ssize_t>();
            if (position >= 0 && taken[position]) position = -1;  // a second name
            if (position >= 0) {
              taken[position] = true;
              usable_ = usable_ && classes.contains(pybind11::type::handle_of(value));
            }
          }
          entries_.push_back({pybind11::reinterpret_borrow<pybind11::object>(key), value, Py_TYPE(value), position});
        }
      }
      node.places[3] = place_of(attributes.ptr(), 3);
      PyObject* scratch = attribute(attributes.ptr(), 3, node.places[3]);
      usable_ = usable_ && scratch != nullptr && PyAnySet_Check(scratch);
      if (!usable_) return;
      node.scratch = pybind11::reinterpret_steal<pybind11::object>(PyFrozenSet_New(scratch));
      nodes_.push_back(std::move(node));
    }
    for (const bool one : taken) usable_ = usable_ && one;
  }

  // The tensors by position, or None if anything has changed.
  pybind11::object tensors(const pybind11::object& root) const {
    if (!usable_ || nodes_.empty() || root.ptr() != nodes_[0].module) return pybind11::none();
    pybind11::list found(size_);
    auto entry = entries_.begin();
    for (const Node& node : nodes_) {
      if (Py_TYPE(node.module) != node.type) return pybind11::none();
      const pybind11::object attributes = attributes_of(node.module);
      for (int d = 0; d < 3; ++d) {
        PyObject* entries = entries_of(attributes.ptr(), d, node.places[d]);
        if (entries == nullptr || PyDict_GET_SIZE(entries) != node.sizes[d]) return pybind11::none();
        PyObject *key, *value;
        Py_ssize_t at = 0;
        for (Py_ssize_t k = 0; k < node.sizes[d]; ++k, ++entry) {
          PyDict_Next(entries, &at, &key, &value);
          if (key != entry->key.ptr() || value != entry->value || Py_TYPE(value) != entry->type)
            return pybind11::none();
          if (entry->position >= 0) PyList_SET_ITEM(found.ptr(), entry->position, Py_NewRef(value));
        }
      }
      if (!same_set(attribute(attributes.ptr(), 3, node.places[3]), node.scratch.ptr())) return pybind11::none();
    }
    return found;
  }

 private:
  struct Node {
    PyObject* module;
    PyTypeObject* type;
    Py_ssize_t sizes[3];
    Py_ssize_t places[4];  // where PyDict_Next finds the attributes
    pybind11::object scratch;
  };
  struct Entry {
    pybind11::object key;
    PyObject* value;
    PyTypeObject* type;
    Py_ssize_t position;  // -1 for a submodule, None and a tensor that is not wanted
  };

  static const pybind11::str* names() {
    // Not freed: static objects outlive the interpreter.
    static const auto* all = new pybind11::str[4]{
        interned("_modules"), interned("_parameters"), interned("_buffers"), interned("_non_persistent_buffers_set")};
    return all;
  }
  static pybind11::str interned(const char* name) {
    return pybind11::reinterpret_steal<pybind11::str>(PyUnicode_InternFromString(name));
  }
  static pybind11::object attributes_of(PyObject* module) {
    auto found = pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(module, nullptr));
    if (!found) throw pybind11::error_already_set();
    return found;
  }
  static Py_ssize_t place_of(PyObject* attributes, int name) {
    PyObject* key;
    for (Py_ssize_t place = 0, at = 0; PyDict_Next(attributes, &at, &key, nullptr); place = at)
      if (key == names()[name].ptr()) return place;
    return 0;
  }
  // Returns the attribute, or null. Looks at its last place first, which takes a third of the time of a lookup.
  static PyObject* attribute(PyObject* attributes, int name, Py_ssize_t place) {
    PyObject *key, *value;
    if (PyDict_Next(attributes, &place, &key, &value) && key == names()[name].ptr()) return value;
    return PyDict_GetItemWithError(attributes, names()[name].ptr());
  }
  // Returns a plain dictionary, or null: subclasses iterate in ways of their own.
  static PyObject* entries_of(PyObject* attributes, int name, Py_ssize_t place) {
    PyObject* found = attribute(attributes, name, place);
    return found != nullptr && PyDict_CheckExact(found) ? found : nullptr;
  }
  static bool same_set(PyObject* set, PyObject* before) {
    if (set == nullptr || !PyAnySet_Check(set)) return false;
    if (PySet_GET_SIZE(set) != PySet_GET_SIZE(before)) return false;
    const int same = PySet_GET_SIZE(set) == 0 ? 1 : PyObject_RichCompareBool(set, before, Py_EQ);
    if (same < 0) throw pybind11::error_already_set();
    return same == 1;
  }

  Py_ssize_t size_;
  bool usable_ = true;
  std::vector<Node> nodes_;
  std::vector<Entry> entries_;
};

}  // namespace selfsup_kernels
