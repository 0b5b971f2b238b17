"""The making of models: DMD2 distillation, and everything that the demo model is made of.

It stands on dmd2/, which never imports it. Read the method first: distribution_matching,
fake_score, discriminator, backward_simulation, distillation. Then the demo: scenes, drawing,
checker (the data), networks, vae, teacher (the models that are distilled).
"""
