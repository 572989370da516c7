"""Long runs on real servers, every token checked. ``make soak`` runs the first four.

python -m tests.soak.server --minutes 10            # load in many configurations; --list
python -m tests.soak.server --only tight-late --drafts mimo-v2  # the same with drafts
python -m tests.soak.kill --kills 100               # SIGKILL while storage is written
python -m tests.soak.storm --minutes 20 --tp 2      # every call of an operator
python -m tests.soak.weights_under_load --tp 2      # weights that change under load
python -m tests.soak.waits                          # no step waits for a copy to the host
"""
