"""The budgeted search: what each part of a model loses, weighs and takes in each format, and the best mix of them.

A part is a group of products, which formats are for, or a block, which cuts are for; both are measured in one way.

groups                the products that get a format together: they share an input or a weight
formats               what they may become: passes of a recipe, tried on one group alone
block_cuts            what blocks may become: structural passes of a recipe, tried on one block alone
head_removal          attentions without one head, for the profile only
trial_inputs          the samples that formats and cuts are fitted to and judged by
sensitivity           what the whole model loses when one part takes one format
kernels               how long one group takes in one format, on this or on another machine
sensitivity_profile   all of that for a model
assignment            cuts, and a format for each group, so that limits hold and what is left is least
selection             which of all assignments to build next
budget                limits -> assignment -> passes -> measured, and mended where the prediction was off

Imports `building`, on whose work it tries formats and cuts, and what lies below it.
"""
