"""The budgeted search: what each part of a model loses, weighs and takes in each format, and the best mix of them.

A part is a group, which formats are for, or a block, which cuts are for; both are measured in one way.

groups          the parts that get a format each: products that share an input or a weight
formats        what they may become: passes of a recipe, tried on one group alone
cuts           what blocks may become: structural passes of a recipe, tried on one block alone
heads          attentions without one head, for the map only
sensitivity    what the whole model loses when one part takes one format
kernels        how long one group takes in one format, on this or on another machine
assignment     cuts, and a format for each group, so that limits hold and what is left is least
choosing       which of all assignments to build next
budget         limits -> assignment -> passes -> measured, and mended where the prediction was off

Imports `build`, on whose work it tries formats and cuts, and what lies below it.
"""
