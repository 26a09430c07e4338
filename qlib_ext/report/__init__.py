"""From a recorder to tables, plots and one self-contained HTML page.

`tables` arranges what `qlib_ext.metrics` computes into frames, `plots` draws frames,
`page` writes the HTML, `recorders` reads any Qlib recorder. Nothing here computes a
figure of its own.
"""
