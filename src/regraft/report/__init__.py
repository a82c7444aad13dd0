"""Reports: one self-contained HTML page per run, made of sections that any part of regraft can add to."""
