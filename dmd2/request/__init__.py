"""What is asked: a frozen request, every rule of which is checked here. No torch.

May import the ground alone.
"""
