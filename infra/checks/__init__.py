"""What `rewatch doctor` examines: the machine, the services, the models, the work. Each answer names its fix.

`examine.examine` asks everything side by side; a check that breaks is a failed check, never a broken doctor.
"""
