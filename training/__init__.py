"""The making of models: DMD2 distillation, and everything that the demo model is made of.

It stands on dmd2/, which never imports it. Read in this order: scenes, drawing, checker (the
data); networks, vae, teacher (the models that are distilled); then the method itself:
distribution_matching, fake_score, discriminator, backward_simulation, distillation.
"""
