"""Pictures to move: a question, controls, a picture, and the picture in words.

Each room holds one explorer, a function that returns an Explorer (frame.py). Show it
as the last line of a notebook's cell:

    temperature   which tokens gain when a teacher is asked at a higher temperature?
    directions    where do forward and reverse KL send a student that is too small?
    mixtures      what do JSD's beta and kl_mix's lam turn, and what do they shrink?
    landscape     where does each objective end, for a student of two parameters?
    context       how much of a context is lost for good as it shrinks?
    sparse        what do k tokens of a teacher leave of its gradient?
    microscope    of which tokens is an example's loss made, and what does each ask for?
    live_run      what does a run lose when it is stopped and resumed?

Every number comes from the rooms below. ipywidgets and matplotlib are imported when an
explorer is made, not before.
"""
