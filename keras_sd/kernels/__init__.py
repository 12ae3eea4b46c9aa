"""Kernels: faster or smaller ways to compute what the models compute.

Each one decides by a rule when it is used, and cites the measurement behind the rule. Tests compare each with
a plain reference.
"""
