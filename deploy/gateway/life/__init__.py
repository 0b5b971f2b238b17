"""What becomes of a prediction: its turn, its tries, its end; whether there are engines for it.

May import keeping and the ground.
"""
