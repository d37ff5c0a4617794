"""Products of groups of rows, each with a matrix of its own, and the rows' way there and back."""

from memtrain_kernels.grouped.api import BACKENDS, backend_for, grouped_matmul
from memtrain_kernels.grouped.assignment import Assignment, assign


__all__ = ["BACKENDS", "Assignment", "assign", "backend_for", "grouped_matmul"]
