"""Generated tasks that tell whether a model remembers: seeded, of any size, without a download.

Mixed into text: `recall` (facts told and asked for later) and `reread` (a passage that comes
again). Instead of text: `mqar` (multi-query associative recall), `facts` (a table of facts, learned
by heart), `copy` and `associative` (recall at a distance). Each is a section of `DataConfig`.
"""
