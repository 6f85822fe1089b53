"""Who stands for an artifact: keys, signatures in Cosign's formats, and the policy that asks for them."""
