"""Records of calls: the schema of an op and a struct for C++ are printed from one NamedTuple.

This module imports only the standard library, since the build reads it.
"""

from typing import NewType

Size = NewType("Size", int)
"""A number that follows from the tensors' shapes; symbolic while ``torch.compile`` traces."""

_SCHEMA_TYPES = {Size: "SymInt", bool: "bool", int: "int", float: "float"}
_CPP_TYPES = {Size: "int64_t", bool: "bool", int: "int64_t", float: "double"}


def schema(record) -> str:
    """Return the fields of a record as arguments of an op's schema."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in record.__annotations__.items())


def struct(name: str, record) -> list[str]:
    """Return the lines of a C++ struct with the fields of a record, which reads them from an op's arguments."""
    fields = [(field, _CPP_TYPES[kind]) for field, kind in record.__annotations__.items()]
    return [
        f"struct {name} {{",
        *(f"  {kind} {field};" for field, kind in fields),
        "  // From the arguments of an op, of which they are the next ones.",
        f"  explicit {name}(const StableIValue* at) {{",
        *(f"    {field} = torch::stable::detail::to<{kind}>(at[{i}]);" for i, (field, kind) in enumerate(fields)),
        "  }",
        f"  static constexpr int fields = {len(fields)};",
        "};",
    ]
