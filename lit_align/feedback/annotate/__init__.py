"""A page where people compare completions: `lit-align annotate`.

`desk` decides who gets which task and stores labels; `tables` is its database; `guard` refuses what must not reach it;
`server` puts both behind HTTP; `static` is the page. Nothing here imports torch.
"""
