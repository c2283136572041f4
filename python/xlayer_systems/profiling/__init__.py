"""Profiles of a system's training steps: `xlayer profile`.

``capture``  a few steps and an evaluation of the shared loop, with regions, under a profiler
``summary``  what a trace or the tables of Nsight say, as one table
``nsight``   command lines of Nsight Systems and Nsight Compute, and their tables
``command``  one profile from its description to its report
"""
