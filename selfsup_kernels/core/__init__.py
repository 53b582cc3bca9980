"""Code shared by the ops: their definition and dispatch, argument checks, process groups, the build."""
