"""A made-up world for tests and the quickstart: labelled pictures, and what can be said and asked about them.

Pictures show up to four coloured shapes, a written word or number, or a small chart. `world.ToyWorld` are its
settings, `samples.toy_samples` gives its captions, documents and conversations, `samples.toy_questions` questions of
one kind with their answers, `labels.labelled_pictures` pictures with the class of each patch, and `formats` writes them
in the formats of real data sets. All of it is a pure function of (settings, split, number); the pixels of printed
characters are those of the installed Pillow.

Three splits: `train`; `unseen_pictures`, drawn like `train` but apart from it; and `unseen_combinations`, where each
picture holds a combination or a word that `train` never shows.
"""
