"""What the ops share: how one is defined and chosen, checks, processes, the build."""
