"""Tuning: searches the kernel templates' schedules by measuring them, and remembers what it found.

task      what is tuned: one kernel for one target and number of threads; the tasks of a graph
space     the schedules that are legal for a task, and a cheap model of their time
traces    MetaSchedule's design spaces of kernels without a template
database  the append-only file of results
builder   candidates -> object code, in workers that live on
runner    object code -> seconds, in a child process that may crash or hang (child.py, timing.c)
session   the loop: which task next, which candidates, until trials or time are spent
settle    what was found, timed inside of the whole model beside the defaults: what loses there is withdrawn (whole.py)
"""
