"""Suites of benchmarks over two harnesses: the table of rows, what each harness is told and leaves
behind, and what came of all rows, model beside model."""
