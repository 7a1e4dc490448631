"""The budgeted search: what each part of a model loses, weighs and takes in each format, and the best mix of them.

units          the parts that get a format each: products that share an input or a weight
formats        what they may become: passes of a recipe, tried on one unit alone
sensitivity    what the whole model loses when one unit takes one format
kernels        how long one unit takes in one format, on this or on another machine
assignment     a format for each unit, so that limits hold and what is left is least
budget         limits -> assignment -> passes -> measured, and mended where the prediction was off
"""
